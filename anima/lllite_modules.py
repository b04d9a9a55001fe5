"""ControlNet-LLLite for Anima (its second form): small networks that change the inputs of single layers.

One trunk turns the control image into tokens, which all modules share. A module before a layer:

    l = condition + depth_embed                               # B L E
    gamma, beta = halves of cond_to_film(l)                   # each B L M
    h = silu(mid(join(l, silu(down(x)))) * (1 + gamma) + beta)
    layer(x + multiplier * up(h))

Module names follow the files of other programs. Source: docs/anima_train_control_net_lllite.md of sd-scripts.
"""
# Letters: B batch, L image tokens, C width of a layer's input, D of the trunk, E of the condition, M inner

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from anima.options import TARGETS

PREFIX = "lllite_dit_"  # then the layer's path, with "_" for "."
TRUNK = "lllite_conditioning1"
DILATIONS = (1, 2, 4, 8)
_ORDER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "cross_attn.q_proj", "mlp.layer1")


@dataclass(frozen=True)
class LlliteConfig:
    """Dimensions of a ControlNet-LLLite's trunk and modules."""

    cond_emb_dim: int = 32  # E
    cond_dim: int = 64  # D, even
    resblocks: int = 1
    mlp_dim: int = 64  # M
    use_aspp: bool = False
    dilations: tuple[int, ...] = DILATIONS
    layers: tuple[str, ...] = TARGETS["self_attn_q_pre"]  # layers of a block that get a module
    cond_in_channels: int = 3  # of control images; 4: with a mask of the inpainted area
    hides_masked: bool = False  # whether the masked area is gray in the control image


def make_norm(channels: int) -> nn.GroupNorm:
    """Return a GroupNorm with the largest of 8, 4, 2 and 1 groups that divides the channels."""
    groups = 8
    while channels % groups:
        groups //= 2
    return nn.GroupNorm(groups, channels)


class ControlResidual(nn.Module):
    """Residual block x + conv2(silu(norm2(conv1(silu(norm1(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = make_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.norm2 = make_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x, B C H W."""
        h = self.conv1(functional.silu(self.norm1(x)))
        return x + self.conv2(functional.silu(self.norm2(h)))


class ControlPyramid(nn.Module):
    """Atrous spatial pyramid pooling (ASPP): concatenates dilated convolutions and the image's mean."""

    def __init__(self, channels: int, dilations: Sequence[int]) -> None:
        super().__init__()

        def layer(size: int, dilation: int, inputs: int = channels) -> nn.Sequential:
            padding = dilation if size > 1 else 0
            convolution = nn.Conv2d(inputs, channels, size, padding=padding, dilation=dilation)
            return nn.Sequential(convolution, make_norm(channels), nn.SiLU())

        self.branches = nn.ModuleList(
            layer(size=1 if dilation == 1 else 3, dilation=dilation) for dilation in dilations
        )
        self.global_conv = layer(size=1, dilation=1)
        self.proj = layer(size=1, dilation=1, inputs=channels * (len(dilations) + 1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the pooling pyramid to x, B C H W, and concatenate its branches."""
        views = [branch(x) for branch in self.branches]
        full = self.global_conv(x.mean(dim=(2, 3), keepdim=True))
        views.append(functional.interpolate(full, x.shape[2:], mode="bilinear", align_corners=False))
        return self.proj(torch.cat(views, dim=1))


class LlliteTrunk(nn.Module):
    """Convert control images, B 3 or 4 H W in -1..1, to a condition per token, B L E, row by row."""

    def __init__(self, config: LlliteConfig) -> None:
        super().__init__()
        half, full = config.cond_dim // 2, config.cond_dim
        self.conv1 = nn.Conv2d(config.cond_in_channels, half, kernel_size=4, stride=4)
        self.norm1 = make_norm(half)
        self.conv2 = nn.Conv2d(half, half, kernel_size=3, padding=1)
        self.norm2 = make_norm(half)
        self.conv3 = nn.Conv2d(half, full, kernel_size=4, stride=4)
        self.norm3 = make_norm(full)
        self.resblocks = nn.ModuleList(ControlResidual(full) for _ in range(config.resblocks))
        self.aspp = ControlPyramid(full, config.dilations) if config.use_aspp else None
        self.proj = nn.Conv2d(full, config.cond_emb_dim, kernel_size=1)
        self.out_norm = nn.LayerNorm(config.cond_emb_dim)

    def forward(self, controls: Tensor) -> Tensor:
        """Return one condition per token, B L E, for control images B 3 or 4 H W."""
        h = functional.silu(self.norm1(self.conv1(controls)))
        h = functional.silu(self.norm2(self.conv2(h)))
        h = functional.silu(self.norm3(self.conv3(h)))
        for block in self.resblocks:
            h = block(h)
        if self.aspp is not None:
            h = self.aspp(h)
        return self.out_norm(rearrange(self.proj(h), "b e h w -> b (h w) e"))


class AnimaLlliteModule(nn.Module):
    """Compute a correction of one layer's input from the control image."""

    def __init__(self, config: LlliteConfig, width: int, dropout: float = 0.0) -> None:
        """Build the LLLite module for a layer whose input has `width` channels."""
        super().__init__()
        self.down = nn.Linear(width, config.mlp_dim)
        self.mid = nn.Linear(config.cond_emb_dim + config.mlp_dim, config.mlp_dim)
        self.cond_to_film = nn.Linear(config.cond_emb_dim, 2 * config.mlp_dim)
        self.up = nn.Linear(config.mlp_dim, width)
        self.depth_embed = nn.Parameter(torch.zeros(config.cond_emb_dim))
        self.dropout = nn.Dropout(dropout)
        for layer in (self.cond_to_film, self.up):  # a new one changes nothing
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return the correction of x, B L C, computed from the embedded control image, B L E."""
        own = condition + self.depth_embed
        gamma, beta = self.cond_to_film(own).chunk(2, dim=-1)
        h = self.mid(torch.cat([own, functional.silu(self.down(x))], dim=-1))
        return self.up(self.dropout(functional.silu(h * (1 + gamma) + beta)))


class AnimaLllite(nn.Module):
    """The trunk and all blocks' modules of a ControlNet-LLLite; attribute names match those in files."""

    def __init__(
        self, config: LlliteConfig, num_blocks: int, input_widths: dict[str, int], dropout: float = 0.0
    ) -> None:
        """Build the modules for a transformer of `num_blocks` blocks; `input_widths`: by layer path."""
        super().__init__()
        self.lllite_conditioning1 = LlliteTrunk(config)
        for name, path in list_layers(config.layers, num_blocks):
            width = input_widths[path.split(".", 2)[2]]
            self.add_module(name, AnimaLlliteModule(config, width, dropout))


def list_layers(layers: Sequence[str], num_blocks: int) -> Iterator[tuple[str, str]]:
    """Yield each module's name in files and the path of the layer it modifies, in forward order.

    `layers` are the layers of each block that have a module.
    """
    for block in range(num_blocks):
        for layer in _ORDER:
            if layer in layers:
                path = f"blocks.{block}.{layer}"
                yield PREFIX + path.replace(".", "_"), path
