"""The CLIP ViT-H image encoder of image-to-video models: turn an image into 257 vectors.

The vectors are those before the tower's last block. Module names follow the released file (its `visual.`
half), so that file needs no table.
"""
# Letters: B batch, L tokens (class token and patches), N heads, D head width, C = N * D

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints.dialects import (
    LoadPlan,
    Names,
    count,
    load_planned,
    make_shape_reader,
    make_wrong_kind_error,
    rename_sources,
    translate_name,
)
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from encoders.clip_checkpoints import MEAN, STD
from modules.devices import dtype_name, replace_slow_float16
from modules.errors import CheckpointError
from protocols.loading import TensorSource

logger = logging.getLogger(__name__)

CLIP_HEAD_WIDTH = 80  # cannot be read from the tensors of a ViT-H file

HF_CLIP: Names = (
    (r"embeddings\.class_embedding", "cls_embedding"),
    (r"embeddings\.position_embedding\.weight", "pos_embedding"),
    (r"embeddings\.patch_embedding\.weight", "patch_embedding.weight"),
    (r"pre_layrnorm\.(weight|bias)", r"pre_norm.\1"),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.(weight|bias)", r"transformer.\1.norm\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", r"transformer.\1.attn.\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)", r"transformer.\1.attn.proj.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.(weight|bias)", r"transformer.\1.mlp.0.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.(weight|bias)", r"transformer.\1.mlp.2.\2"),
)
# tensors after the last block, and positions that old versions of transformers saved
_UNUSED = ("head", "post_norm.*", "post_layernorm.*", "*.position_ids")
_OTHER_TOWERS = (
    "textual.",
    "log_scale",
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
)


@dataclass(frozen=True)
class ClipConfig:
    """Dimensions of a CLIP image tower without its last block, whose output is never used."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    image_size: int
    patch_size: int


def read_clip(checkpoint: Checkpoint) -> LoadPlan[ClipConfig]:
    """Plan how to load the CLIP image tower from the official file, its visual half or a Hugging Face file.

    Raises CheckpointError for any other file.
    """
    checkpoint = checkpoint.without_prefix(
        "model.", "visual.", "vision_model.", ignored_prefixes=_OTHER_TOWERS
    )
    sources = rename_sources(list_tensor_sources(checkpoint), lambda name: translate_name(name, HF_CLIP))
    num_layers = count(sources, r"transformer\.\d+") - 1  # Wan uses the states before the last block
    if num_layers < 1 or "cls_embedding" not in sources or "pos_embedding" not in sources:
        raise make_wrong_kind_error(
            checkpoint,
            "a CLIP image encoder",
            "--clip",
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth or clip_vision_h.safetensors",
        )
    if "embeddings.class_embedding" in checkpoint.tensors:
        # Hugging Face stores both embeddings without the leading axes of size 1
        sources["cls_embedding"] = sources["cls_embedding"].with_step(lambda tensor: tensor[None, None])
        sources["pos_embedding"] = sources["pos_embedding"].with_step(lambda tensor: tensor[None])
    _join_heads(sources, num_layers)
    shape = make_shape_reader(checkpoint, sources)
    dim, _, patch, _ = shape("patch_embedding.weight")
    if dim % CLIP_HEAD_WIDTH:
        raise CheckpointError(
            f"{checkpoint.path}: width {dim} is not a multiple of {CLIP_HEAD_WIDTH}, the head width of ViT-H",
            checkpoint.path,
        )
    grid_size = math.isqrt(shape("pos_embedding")[-2] - 1)
    config = ClipConfig(
        dim=dim,
        ffn_dim=shape("transformer.0.mlp.0.weight")[0],
        num_heads=dim // CLIP_HEAD_WIDTH,
        num_layers=num_layers,
        image_size=grid_size * patch,
        patch_size=patch,
    )
    last_block = (f"transformer.{num_layers}.*", f"encoder.layers.{num_layers}.*")
    return LoadPlan(config, checkpoint, sources, _UNUSED + last_block)


def _join_heads(sources: dict[str, TensorSource], num_layers: int) -> None:
    """Concatenate the matrices of q, k and v in layers that store them separately."""
    for index in range(num_layers):
        for leaf in ("weight", "bias"):
            names = [f"transformer.{index}.attn.{part}.{leaf}" for part in "qkv"]
            if all(name in sources for name in names):
                joined = tuple(sources.pop(name).names[0] for name in names)
                sources[f"transformer.{index}.attn.to_qkv.{leaf}"] = TensorSource(joined, _rows)


def _rows(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


class ImageAttention(nn.Module):
    """Attention among all tokens, with one matrix for q, k and v."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.to_qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Compute self-attention of the tokens x, B L C to B L C."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each B N L D
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ClipBlock(nn.Module):
    """Attention and feed-forward with residuals.

    The residual stream and the norms are float32, the rest has the compute dtype, as with the released code's
    autocast.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim)
        self.attn = ImageAttention(config)
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to tokens x, B L C float32."""
        dtype = self.attn.proj.weight.dtype
        x = x + self.attn(self.norm1(x).to(dtype))
        return x + self.mlp(self.norm2(x).to(dtype))


class WanClipVision(nn.Module):
    """The image tower without its last block.

    Build it on the meta device and load a checkpoint with `load_clip`.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        patches = (config.image_size // config.patch_size) ** 2
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, patches + 1, config.dim))
        self.patch_embedding = nn.Conv2d(
            3, config.dim, config.patch_size, stride=config.patch_size, bias=False
        )
        self.pre_norm = nn.LayerNorm(config.dim)
        self.transformer = nn.ModuleList(ClipBlock(config) for _ in range(config.num_layers))

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the encoder."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the encoder."""
        return self.patch_embedding.weight.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images to 257 vectors each.

        Args:
            pixels: B 3 H W in -1..1, of any size.

        Returns:
            Features, B 257 C, in the compute dtype, on the encoder's device.
        """
        x = self.patch_embedding(self.prepare(pixels).to(self.dtype)).flatten(2).transpose(1, 2)  # B L-1 C
        # float32: the residual stream and the norms are not computed in 16 bits
        x = torch.cat([self.cls_embedding.expand(len(x), -1, -1), x.float()], dim=1) + self.pos_embedding
        x = self.pre_norm(x)
        for block in self.transformer:
            x = block(x)
        return x.to(self.dtype)

    def prepare(self, pixels: Tensor) -> Tensor:
        """Resize to the tower's square, bicubic without antialiasing as released; normalize in float32."""
        size = (self.image_size, self.image_size)
        pixels = F.interpolate(pixels.to(self.device).float(), size=size, mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (MEAN, STD))
        return (pixels * 0.5 + 0.5 - mean) / std


def load_clip(path: Path, device: torch.device, dtype: torch.dtype = torch.float16) -> WanClipVision:
    """Load the image tower. On a CPU it computes in float32 instead of float16.

    Raises CheckpointError if the file is damaged or contains another model.
    """
    dtype = replace_slow_float16(device, dtype, "CLIP")

    def select_tensor_dtype(name: str, stored: torch.dtype) -> torch.dtype:
        """Keep norms and embeddings in float32."""
        return torch.float32 if "norm" in name or name.endswith("_embedding") else dtype

    with open_checkpoint(path) as checkpoint:
        clip = load_planned(
            read_clip(checkpoint),
            WanClipVision,
            device,
            select_tensor_dtype,
            label="the CLIP image encoder (--clip)",
        )
    logger.info("CLIP: %s, computing in %s", path, dtype_name(dtype))
    return clip
