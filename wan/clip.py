"""The CLIP ViT-H image encoder of image-to-video models: turn an image into 257 vectors.

The vectors are those before the tower's last block. Module names follow the released file (its `visual.`
half).
"""
# Letters: B batch, L tokens (class token and patches), N heads, D head width, C = N * D

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.clip_checkpoints import MEAN, STD
from modules.checkpoints.dialects import load_planned
from modules.checkpoints.opening import open_checkpoint
from modules.devices import dtype_name, half_where_fast
from wan.encoder_checkpoints import ClipConfig, read_clip

logger = logging.getLogger(__name__)


class ImageAttention(nn.Module):
    """Attention among all tokens, with one matrix for q, k and v."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.to_qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
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
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images. pixels: B 3 H W in -1..1, of any size.

        Returns B 257 C in the compute dtype, on the encoder's device.
        """
        x = self.patch_embedding(self.prepare(pixels).to(self.dtype)).flatten(2).transpose(1, 2)  # B L-1 C
        x = torch.cat([self.cls_embedding.expand(len(x), -1, -1), x.float()], dim=1) + self.pos_embedding
        x = self.pre_norm(x)
        for block in self.transformer:
            x = block(x)
        return x.to(self.dtype)

    def prepare(self, pixels: Tensor) -> Tensor:
        """Resize to the tower's square, bicubic without antialiasing, as released; normalise, float32."""
        size = (self.image_size, self.image_size)
        pixels = F.interpolate(pixels.to(self.device).float(), size=size, mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (MEAN, STD))
        return (pixels * 0.5 + 0.5 - mean) / std


def load_clip(path: Path, device: torch.device, dtype: torch.dtype = torch.float16) -> WanClipVision:
    """Load the image tower. On a CPU it computes in float32 instead of float16.

    Raises CheckpointError if the file is damaged or holds another model.
    """
    dtype = half_where_fast(device, dtype, "CLIP")

    def dtype_of(name: str, stored: torch.dtype) -> torch.dtype:
        return torch.float32 if "norm" in name or name.endswith("_embedding") else dtype

    with open_checkpoint(path) as checkpoint:
        clip = load_planned(
            read_clip(checkpoint), WanClipVision, device, dtype_of, "the CLIP image encoder (--clip)"
        )
    logger.info("CLIP: %s, computing in %s", path, dtype_name(dtype))
    return clip
