"""CLIP's image tower with its projection: turn an image into one vector, which compares with those of texts.

Module names follow Hugging Face's files. Source: Radford et al. 2021, arXiv 2103.00020.
"""
# Letters: B images, L patches and the class token, C width, P width of the projection

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from encoders.clip_layers import ClipLayers, check_activation
from encoders.clip_vision_checkpoints import ClipVisionConfig, read_clip_vision
from modules.checkpoints.dialects import load_planned
from modules.checkpoints.opening import open_checkpoint

# statistics of CLIP's training images, RGB in 0..1: Radford et al. 2021, arXiv 2103.00020
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ClipVisionEmbeddings(nn.Module):
    """Embed patches and the class token in front of them, and add their positions."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.dim))
        self.patch_embedding = nn.Conv2d(
            3, config.dim, config.patch_size, stride=config.patch_size, bias=False
        )
        positions = (config.image_size // config.patch_size) ** 2 + 1
        self.position_embedding = nn.Embedding(positions, config.dim)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # B L-1 C
        x = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        return x + self.position_embedding.weight


class ClipVision(nn.Module):
    """The image tower. Build it on the meta device and load a checkpoint with `load_clip_vision`."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.embeddings = ClipVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.dim, config.eps)  # spelt as in the files
        self.encoder = ClipLayers(config, is_causal=False)
        self.post_layernorm = nn.LayerNorm(config.dim, config.eps)
        self.visual_projection = nn.Linear(config.dim, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the projected state of the class token, B P. pixels: B 3 S S, as `prepare` returns them."""
        x = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.visual_projection(self.post_layernorm(x[:, 0]))

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Return one vector for each image, B P, in the compute dtype, on the tower's device."""
        weight = self.visual_projection.weight
        return self(self.prepare(images).to(weight.device, weight.dtype))

    def prepare(self, images: Sequence[Image.Image]) -> Tensor:
        """Return images as the tower sees them, B 3 S S float32: resized, cut to the middle, normalised.

        Pillow resizes (bicubic, antialiased) the shorter side to S, as the released model's processor does.
        """
        prepared = numpy.stack([self._square(image) for image in images])
        pixels = rearrange(torch.from_numpy(prepared), "b h w c -> b c h w").float() / 255
        return _normalise(pixels)

    def prepare_pixels(self, pixels: Tensor) -> Tensor:
        """Return pixels B 3 H W, in 0..1, as `prepare` does, but so that gradients flow to them."""
        size, (height, width) = self.image_size, pixels.shape[-2:]
        inner = size * height // min(height, width), size * width // min(height, width)
        resized = F.interpolate(pixels, inner, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (inner[0] - size) // 2, (inner[1] - size) // 2
        return _normalise(resized[..., top : top + size, left : left + size])

    def _square(self, image: Image.Image) -> "numpy.typing.NDArray[numpy.uint8]":
        size, shorter = self.image_size, min(image.size)
        width, height = (size * side // shorter for side in image.size)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        return numpy.array(resized.crop((left, top, left + size, top + size)))


def _normalise(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def load_clip_vision(
    path: Path, device: torch.device, dtype: torch.dtype, option: str, release: str
) -> ClipVision:
    """Load an image tower with its projection; fp8 weights are dequantized.

    option, release: for messages: the option that needs it, and the files that have it. Raises
    CheckpointError if the file is damaged or holds another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_clip_vision(checkpoint, option, release)
        check_activation(plan.config, path, "OpenCLIP has gelu")
        return load_planned(plan, ClipVision, device, dtype, f"the CLIP image encoder ({option})")
