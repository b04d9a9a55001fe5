"""Layers of FLUX's autoencoder, whose images are B C H W.

Module names follow the released file. Source: Esser et al. 2021, arXiv 2012.09841; the released FLUX.1.
"""
# Letters: B batch, C channels, H height, W width (at the layer's own resolution), Z latent channels

from dataclasses import dataclass

import torch.nn.functional as functional
from torch import Tensor, nn

from modules.attention.attend import attend
from modules.layers.convolution import repeat_pixels

EPS = 1e-6  # in every group norm


@dataclass(frozen=True)
class AutoencoderConfig:
    """Dimensions of an autoencoder, read from a checkpoint's tensors."""

    latent_channels: int  # Z
    groups: int  # in every group norm
    widths: tuple[int, ...]  # channels of each level, from the image to the latents
    encoder_blocks: int  # residual blocks in a level
    decoder_blocks: int
    decoder_widths: tuple[int, ...] = ()  # of a decoder that is narrower than the encoder; (): `widths`


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, with a residual connection."""

    def __init__(self, width_in: int, width_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=EPS)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width_out, eps=EPS)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output features, B C H W, where C is the number of output channels."""
        h = self.conv1(norm_and_silu(self.norm1, x))
        h = self.conv2(norm_and_silu(self.norm2, h))
        return h.add_(x if self.nin_shortcut is None else self.nin_shortcut(x))


class SpatialAttention(nn.Module):
    """Single-head self-attention over all pixels, with a residual connection."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=EPS)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features after attention, B C H W like the input."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # B H*W C
        q, k, v = (layer(tokens).unsqueeze(2) for layer in (self.q, self.k, self.v))  # each B H*W 1 C
        attended = self.proj_out(attend(q, k, v).squeeze(2))
        return x + attended.transpose(1, 2).unflatten(2, x.shape[2:])


class Middle(nn.Module):
    """Residual block, attention and another residual block, at the lowest resolution."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width, groups)
        self.attn_1 = SpatialAttention(width, groups)
        self.block_2 = ResidualBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features after all three layers, B C H W like the input."""
        return self.block_2(self.attn_1(self.block_1(x)))


class AutoencoderDownsample(nn.Module):
    """Halve height and width with a strided convolution; only the right and bottom edges are zero-padded."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features with half the height and width, rounded down."""
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class AutoencoderUpsample(nn.Module):
    """Double height and width: repeat each pixel, then apply a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features with twice the height and width."""
        return self.conv(repeat_pixels(x, 2))


class Level(nn.Module):
    """Residual blocks of one resolution, then down- or upsampling if `down` or `up` is set."""

    def __init__(
        self, width_in: int, width: int, blocks: int, groups: int, down: bool = False, up: bool = False
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(width_in if index == 0 else width, width, groups) for index in range(blocks)
        )
        self.downsample = AutoencoderDownsample(width) if down else None
        self.upsample = AutoencoderUpsample(width) if up else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the features after the residual blocks and the optional down- or upsampling."""
        for layer in (*self.block, self.downsample, self.upsample):
            x = x if layer is None else layer(x)
        return x


class AutoencoderEncoder(nn.Module):
    """Encode pixels B 3 H W as means and log-variances, B 2Z h w."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths
        groups = config.groups
        last = len(config.widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            width_in = widths[max(0, level - 1)]  # the first level keeps the width of `conv_in`
            self.down.append(Level(width_in, width, config.encoder_blocks, groups, down=level < last))
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return means and log-variances, B 2Z h w, for pixels B 3 H W."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(norm_and_silu(self.norm_out, self.mid(x)))


class AutoencoderDecoder(nn.Module):
    """Decode latents B Z h w to pixels B 3 H W.

    As in the released file, level 0 has the full resolution, so the last level runs first.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.decoder_widths or config.widths
        groups = config.groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            width_in = widths[min(last, level + 1)]  # the last level keeps the width of `mid`
            self.up.append(Level(width_in, width, config.decoder_blocks, groups, up=level > 0))
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Decode latents B Z h w to pixels B 3 H W."""
        x = self.mid(self.conv_in(x))
        for level in reversed(list(self.up)):
            x = level(x)
        return self.conv_out(norm_and_silu(self.norm_out, x))


def norm_and_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a norm and SiLU with only one temporary tensor."""
    return functional.silu(norm(x), inplace=True)
