"""FramePack's image encoder, a SigLIP so400m: turn an image into 729 vectors, its normed last hidden state.

Module names follow Hugging Face's files. Source: Zhai et al. 2023, arXiv 2303.15343.
"""
# Letters: B batch, L patches, C width

import logging
from pathlib import Path

import numpy
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from encoders.clip_layers import ClipLayers, check_activation
from frame_pack.image_checkpoints import OPTION, SiglipConfig, read_siglip
from modules.checkpoints.dialects import load_planned
from modules.checkpoints.opening import open_checkpoint
from modules.devices import dtype_name, half_where_fast
from modules.media.pixels import to_pixels

logger = logging.getLogger(__name__)


class SiglipEmbeddings(nn.Module):
    """Embed patches and their positions; there is no class token."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.dim, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.num_tokens, config.dim)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.position_embedding.weight


class SiglipVision(nn.Module):
    """The image tower without its pooling.

    Build it on the meta device and load a checkpoint with `load_siglip`.
    """

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = ClipLayers(config, is_causal=False)
        self.post_layernorm = nn.LayerNorm(config.dim, config.eps)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.post_layernorm.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.post_layernorm.weight.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images. pixels: B 3 H W in -1..1, of any size.

        Returns B 729 C in the compute dtype, on the encoder's device.
        """
        prepared = self.prepare(pixels).to(self.device, self.dtype)
        return self.post_layernorm(self.encoder(self.embeddings(prepared)))

    def prepare(self, pixels: Tensor) -> Tensor:
        """Resize to the tower's square without keeping the aspect: B 3 S S in -1..1, float32, on the CPU.

        Pillow resizes (bicubic, antialiased) in 8 bits, as the released model's processor does. torch's float
        kernel does not clamp between its two passes and is off by up to 21 of 255 steps on noise. Mean and
        deviation are 0.5, which keeps -1..1 as it is.
        """
        steps = ((pixels.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        size = (self.image_size, self.image_size)
        images = [
            Image.fromarray(image.numpy()) for image in rearrange(steps, "b c h w -> b h w c").contiguous()
        ]
        resized = numpy.stack(
            [numpy.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in images]
        )
        return to_pixels(torch.from_numpy(resized)[:, None]).squeeze(2)


def load_siglip(path: Path, device: torch.device, dtype: torch.dtype = torch.float16) -> SiglipVision:
    """Load the image tower; fp8 weights are dequantized. On a CPU it computes in float32 instead of float16.

    Raises CheckpointError if the file is damaged or holds another model.
    """
    dtype = half_where_fast(device, dtype, "SigLIP")
    with open_checkpoint(path) as checkpoint:
        plan = read_siglip(checkpoint)
        check_activation(plan.config, path, f"SigLIP has {SiglipConfig.activation}")
        siglip = load_planned(plan, SiglipVision, device, dtype, f"the SigLIP image encoder ({OPTION})")
    logger.info("SigLIP: %s, computing in %s", path, dtype_name(dtype))
    return siglip
