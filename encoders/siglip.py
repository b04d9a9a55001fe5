"""SigLIP so400m, an image encoder: an image to 729 vectors, its normed last hidden state.

Module names follow Hugging Face's files. Source: Zhai et al. 2023, arXiv 2303.15343.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from checkpoints.dialects import LoadPlan, count, load_planned, make_shape_reader, make_wrong_kind_error
from checkpoints.encoders import ALL_IN_ONE, find_network, head_width, read_network_config
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from encoders.clip_layers import ClipLayers, check_activation
from modules.devices import dtype_name, replace_slow_float16
from modules.errors import CheckpointError
from modules.media.pixels import to_pixels

ENCODER_OPTION = "--image_encoder"
FILES = (
    "the folder image_encoder of flux_redux_bfl, its model.safetensors or "
    "sigclip_vision_patch14_384.safetensors"
)
HEAD_WIDTH = 72  # head width of so400m, because the tensors do not show it
IMAGE_SIZE = 384  # as FramePack was trained: the tensors only show the number of whole patches
# values that a config.json leaves out: transformers do not write what equals their default
DEFAULTS = {"hidden_size": 768, "num_attention_heads": 12, "layer_norm_eps": 1e-6, "image_size": 224}
_OTHER_TOWER = ("text_model.", "logit_scale", "logit_bias")
# the pooling after the last hidden state; a tensor that old versions of transformers saved
_UNUSED = ("head.*", "embeddings.position_ids")


@dataclass(frozen=True)
class SiglipConfig:
    """Dimensions of a SigLIP image tower."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    # height and width that images are resized to; pixels after the last whole patch are not seen
    image_size: int
    patch_size: int
    activation: str = "gelu_pytorch_tanh"
    eps: float = 1e-6

    @property
    def num_tokens(self) -> int:
        """Return how many tokens an image becomes."""
        return (self.image_size // self.patch_size) ** 2


def read_siglip(checkpoint: Checkpoint) -> LoadPlan[SiglipConfig]:
    """Plan how to load SigLIP's image tower, alone or next to the text tower, in 16 or 8 bits.

    Raises CheckpointError for any other file, such as a CLIP tower, whose patch embedding has no bias.
    """
    tower = find_network(
        checkpoint,
        "embeddings.patch_embedding.bias",
        "encoder.layers.0.self_attn.q_proj.weight",
        _OTHER_TOWER,
    )
    if tower is None:
        raise make_wrong_kind_error(checkpoint, "a SigLIP image encoder", ENCODER_OPTION, FILES)
    sources = list_tensor_sources(tower)
    shape = make_shape_reader(tower, sources)
    patch_shape = shape("embeddings.patch_embedding.weight")
    # A SigLIP for images of several sizes (NaFlex) has a linear patch embedding.
    if len(patch_shape) != 4 or patch_shape[1] != 3 or patch_shape[2] != patch_shape[3]:
        raise CheckpointError(
            f"{checkpoint.path}: the patch embedding has shape {list(patch_shape)}, but a SigLIP for images "
            f"of one size has [width, 3, side, side]. Pass {FILES} to {ENCODER_OPTION}.",
            checkpoint.path,
        )
    dim, _, patch, _ = patch_shape
    settings = read_network_config(
        checkpoint.path, "vision_config", kind="siglip", dim=dim, defaults=DEFAULTS
    )
    num_positions = shape("embeddings.position_embedding.weight")[0]
    config = SiglipConfig(
        dim=dim,
        ffn_dim=shape("encoder.layers.0.mlp.fc1.weight")[0],
        num_heads=dim // head_width(checkpoint.path, dim, settings, HEAD_WIDTH),
        num_layers=count(sources, r"encoder\.layers\.\d+"),
        image_size=_select_image_size(num_positions, patch, settings.get("image_size")),
        patch_size=patch,
        activation=str(settings.get("hidden_act", SiglipConfig.activation)),
        eps=float(settings.get("layer_norm_eps", SiglipConfig.eps)),
    )
    other_networks = tuple(f"{start}*" for start in _OTHER_TOWER + ALL_IN_ONE)
    return LoadPlan(config, tower, sources, _UNUSED + other_networks)


def read_siglip_width(checkpoint: Checkpoint) -> int:
    """Return the number of channels of an image's states, from the header of a file."""
    return read_siglip(checkpoint).config.dim


def _select_image_size(positions: int, patch: int, declared: object) -> int:
    """Return an image size with `positions` patches: config.json's, as released or else the smallest."""
    side = math.isqrt(positions)
    for size in (declared, IMAGE_SIZE):
        if isinstance(size, int) and size // patch == side:
            return size
    return side * patch


logger = logging.getLogger(__name__)


class SiglipVision(nn.Module):
    """The image tower without its pooling.

    Build it on the meta device and load a checkpoint with `load_siglip`.
    """

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        patches = nn.Conv2d(3, config.dim, config.patch_size, stride=config.patch_size)
        positions = nn.Embedding(config.num_tokens, config.dim)  # there is no class token
        self.embeddings = nn.ModuleDict({"patch_embedding": patches, "position_embedding": positions})
        self.encoder = ClipLayers(config, is_causal=False)
        self.post_layernorm = nn.LayerNorm(config.dim, config.eps)

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the encoder."""
        return self.post_layernorm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the encoder."""
        return self.post_layernorm.weight.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels, B 3 H W in -1..1 of any size, as B 729 C in the compute dtype, on the device."""
        prepared = self.prepare(pixels).to(self.device, self.dtype)
        x = self.embeddings["patch_embedding"](prepared).flatten(2).transpose(1, 2)
        x = x + self.embeddings["position_embedding"].get_parameter("weight")
        return self.post_layernorm(self.encoder(x))

    def prepare(self, pixels: Tensor) -> Tensor:
        """Stretch images to the vision tower's square input: B 3 S S in -1..1, float32, on the CPU.

        Pillow resizes (bicubic, antialiased) in 8 bits, as the released model's processor does. torch's float
        kernel does not clamp between its two passes and is off by up to 21 of 255 steps on noise. The tower
        normalizes with mean and deviation 0.5, so -1..1 stays as is.
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
    """Load SigLIP's image tower; fp8 weights are dequantized, and a CPU computes in float32.

    Raises CheckpointError if the file is damaged or contains another model.
    """
    dtype = replace_slow_float16(device, dtype, "SigLIP")
    with open_checkpoint(path) as checkpoint:
        plan = read_siglip(checkpoint)
        check_activation(plan.config, path, f"SigLIP has {SiglipConfig.activation}")
        siglip = load_planned(
            plan, SiglipVision, device, dtype, label=f"the SigLIP image encoder ({ENCODER_OPTION})"
        )
    logger.info("SigLIP: %s, computing in %s", path, dtype_name(dtype))
    return siglip
