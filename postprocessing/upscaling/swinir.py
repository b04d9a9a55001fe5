"""SwinIR: image restoration by attention within small windows, which shift from block to block.

Source: Liang et al. 2021, arXiv 2108.10257; windows and shifts: Liu et al. 2021, arXiv 2103.14030.
"""
# Letters: B batch, H W height and width, C channels, S side of a window, N = S * S tokens of a window,
# G windows computed together

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu, leaky_relu, pad, scaled_dot_product_attention

from modules.devices import tensor_on
from modules.layers.convolution import repeat_pixels
from modules.layers.norms import Float32LayerNorm

COLOURS = 3
MEAN = (0.4488, 0.4371, 0.4040)  # mean color of the training set (DIV2K); not stored in files
EPSILON = 1e-5
MASKED_BIAS = -100.0  # attention bias of two tokens that only share a window because of the cyclic shift
WINDOWS_ON_CPU = 16  # windows per thread, computed together: their features stay in the caches
WINDOWS = 1 << 12  # windows on other devices: bounds the memory
CUDA_WIDTH = 8  # CUDA's fused attention needs a multiple of this as head width; released models have 30


@dataclass(frozen=True)
class SwinirConfig:
    """Sizes and upsampling method of a SwinIR, as read from its file."""

    dim: int  # C
    heads: tuple[int, ...]  # of each layer
    depths: tuple[int, ...]  # blocks of each layer
    window: int  # S
    hidden: int  # width inside the two linear layers of a block
    convolutions: int  # number of convolutions after each layer and at the end: 1, or 3 narrower ones
    upsampler: str  # nearest+conv, pixelshuffle, pixelshuffledirect, none
    upsampling_factors: tuple[int, ...]  # factor of each enlargement
    features: int  # channels while enlarging; not used by pixelshuffledirect and none
    pixel_range: float  # largest pixel value in the network: 1 or 255

    @property
    def factor(self) -> int:
        """Upscaling factor of width and height."""
        return prod(self.upsampling_factors)

    @property
    def step(self) -> int:
        """Side of a window; image sides must be multiples of it."""
        return self.window

    @property
    def with_one_block(self) -> "SwinirConfig":
        """Return the configuration with one block of each kind, for measuring the memory per pixel."""
        return replace(self, heads=self.heads[:1], depths=(1,))


class Attention(nn.Module):
    """Attention among the tokens of a window, with a learned bias for each relative distance."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def bias(self, index: Tensor) -> Tensor:
        """Return the attention bias of a window, heads N N in float32.

        Args:
            index: Row of the bias table for each pair of tokens, N N.
        """
        return rearrange(self.relative_position_bias_table[index].float(), "n m h -> h n m")

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Return tokens after attention within windows, G N C.

        Args:
            x: Tokens of windows, G N C.
            bias: Attention bias, heads N N.
        """
        q, k, v = rearrange(self.qkv(x), "g n (three h d) -> three g h n d", three=3, h=self.heads)
        multiple = CUDA_WIDTH if x.device.type == "cuda" else 1
        mixed = attend(q, k, v, bias=bias, multiple=multiple)
        return self.proj(rearrange(mixed, "g h n d -> g n (h d)"))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, multiple: int) -> Tensor:
    """Compute attention with a bias; return G heads N D.

    The head width is zero-padded to a multiple of `multiple`. Torch's kernels compute scores and softmax in
    float32, whatever the dtype.
    """
    width = q.shape[-1]
    if width % multiple:
        q, k, v = (pad(heads, (0, -width % multiple)) for heads in (q, k, v))
    mask = bias.to(q.dtype)[None]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=width**-0.5)[..., :width]


class SwinMlp(nn.Module):
    """MLP of a Swin block: two linear layers with an activation."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return features after the MLP, B L C."""
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    """Transformer block on windows; the layer around it divides feature maps into windows."""

    def __init__(self, config: SwinirConfig, heads: int) -> None:
        super().__init__()
        self.norm1 = Float32LayerNorm(config.dim, EPSILON, affine=True)
        self.attn = Attention(config.dim, heads, config.window)
        self.norm2 = Float32LayerNorm(config.dim, EPSILON, affine=True)
        self.mlp = SwinMlp(config.dim, config.hidden)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Return tokens after attention within windows, G N C (G windows of N tokens).

        Args:
            x: Tokens of windows, G N C.
            bias: Attention bias, heads N N.
        """
        x = x + self.attn(self.norm1(x).to(x.dtype), bias)
        return x + self.mlp(self.norm2(x).to(x.dtype))


class ResidualGroup(nn.Module):
    """The transformer blocks of a layer."""

    def __init__(self, config: SwinirConfig, heads: int, depth: int) -> None:
        super().__init__()
        self.window = config.window
        self.blocks = nn.ModuleList(Block(config, heads) for _ in range(depth))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Return features after the blocks, B H W C; `index`, N N: bias table row of each token pair."""
        for number, block in enumerate(self.blocks):
            shift = self.window // 2 if number % 2 else 0
            if shift:
                x = torch.roll(x, (-shift, -shift), (1, 2))
            x = self._apply_in_windows(x, block, index, shift)
            if shift:
                x = torch.roll(x, (shift, shift), (1, 2))
        return x

    def _apply_in_windows(self, x: Tensor, block: nn.Module, index: Tensor, shift: int) -> Tensor:
        """Apply a block to the windows of a feature map, B H W C, a few windows at a time."""
        # index: Index of the attention bias for each pair of pixels of a window.
        out = torch.empty_like(x)
        windows = self._view_windows(x)
        results = self._view_windows(out)
        batch, rows, columns = windows.shape[:3]
        max_windows = WINDOWS_ON_CPU * torch.get_num_threads() if x.device.type == "cpu" else WINDOWS
        attention = block.get_submodule("attn")
        assert isinstance(attention, Attention)
        bias = attention.bias(index)
        # a mask is needed only for windows in the last row and column, where shifting joins opposite edges
        row_ranges = _split_by_mask(rows, shift)
        column_ranges = _split_by_mask(columns, shift)
        for row_range, column_range in product(row_ranges, column_ranges):
            masked_bias = mask_wrapped_tokens(
                self.window, row_range.num_wrapped, column_range.num_wrapped, bias
            )
            for slices in split_window_grid(batch, row_range.windows, column_range.windows, max_windows):
                some_windows = windows[slices]
                tokens = rearrange(some_windows, "b h w p q c -> (b h w) (p q) c")
                results[slices] = block(tokens, masked_bias).reshape(some_windows.shape)
        return out

    def _view_windows(self, x: Tensor) -> Tensor:
        """View B H W C as windows of S S C: B, rows, columns, S, S, C."""
        return rearrange(x, "b (h p) (w q) c -> b h w p q c", p=self.window, q=self.window)


def mask_wrapped_tokens(window: int, rows: int, columns: int, bias: Tensor) -> Tensor:
    """Return the attention bias, heads N N, that masks the last rows and columns of a window.

    Windows are shifted cyclically, so these rows and columns come from the opposite edge of the image.
    """
    if not rows and not columns:
        return bias
    position = torch.arange(window, device=bias.device)
    is_below = position >= window - rows
    is_right = position >= window - columns
    region = (is_below.long()[:, None] * 2 + is_right.long()[None]).flatten()  # N
    return bias + MASKED_BIAS * (region[:, None] != region[None]).to(bias.dtype)


class _WindowRange(NamedTuple):
    """A range of window rows or columns that share one attention mask."""

    windows: range
    num_wrapped: int  # rows or columns at the end of each window that come from the opposite edge


def _split_by_mask(count: int, shift: int) -> list[_WindowRange]:
    """Return the ranges of windows along an axis; with a shift, the last window is a separate range."""
    if not shift:
        return [_WindowRange(range(count), 0)]
    return [_WindowRange(range(count - 1), 0), _WindowRange(range(count - 1, count), shift)]


def split_window_grid(
    batch: int, rows: range, columns: range, maximum: int
) -> Iterator[tuple[slice, slice, slice]]:
    """Divide a batch of grids of windows into blocks of at most `maximum` windows.

    Yields the slices of batch, rows and columns of each block; `rows` and `columns` are the ranges to divide.
    """
    if not rows or not columns:
        return  # such as the rows before the last one, of a grid with one row
    # as many whole rows as possible, then as many whole grids
    max_columns = min(len(columns), maximum)
    max_rows = max(1, min(len(rows), maximum // max_columns))
    max_batch = max(1, min(batch, maximum // (max_columns * max_rows)))
    yield from product(
        _split_range(range(batch), max_batch),
        _split_range(rows, max_rows),
        _split_range(columns, max_columns),
    )


def _split_range(indices: range, maximum: int) -> list[slice]:
    """Return slices of at most `maximum` indices that cover a range."""
    starts = range(indices.start, indices.stop, maximum)
    return [slice(start, min(start + maximum, indices.stop)) for start in starts]


def convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 3 x 3 convolution that preserves height and width."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def convolutions(config: SwinirConfig) -> nn.Module:
    """Return the convolutions after a layer: one, or three with a bottleneck of `dim` // 4 channels."""
    dim = config.dim
    narrow = config.dim // 4
    if config.convolutions == 1:
        return convolution(dim, dim)
    return nn.Sequential(
        convolution(dim, narrow),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(narrow, narrow, 1),
        nn.LeakyReLU(0.2, inplace=True),
        convolution(narrow, dim),
    )


class Layer(nn.Module):
    """Transformer blocks followed by convolutions, with a residual connection."""

    def __init__(self, config: SwinirConfig, heads: int, depth: int) -> None:
        super().__init__()
        self.residual_group = ResidualGroup(config, heads, depth)
        self.conv = convolutions(config)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Return features after the blocks and convolutions, B H W C."""
        return x + as_tokens(self.conv(as_map(self.residual_group(x, index))))


def as_map(x: Tensor) -> Tensor:
    """View a feature map B H W C as B C H W, in channels-last memory format."""
    return rearrange(x, "b h w c -> b c h w")


def as_tokens(x: Tensor) -> Tensor:
    """View a feature map B C H W as B H W C, without a copy if its memory format is channels last."""
    return rearrange(x, "b c h w -> b h w c").contiguous()


class SwinIR(nn.Module):
    """SwinIR, a network that upscales or restores images."""

    def __init__(self, config: SwinirConfig) -> None:
        """Create SwinIR's layers with the module names of its files."""
        super().__init__()
        self.config = config
        self.conv_first = convolution(COLOURS, config.dim)
        # nested, because files have one more level in the name
        self.patch_embed = nn.ModuleDict({"norm": Float32LayerNorm(config.dim, EPSILON, affine=True)})
        self.layers = nn.ModuleList(
            Layer(config, heads, depth) for heads, depth in zip(config.heads, config.depths, strict=True)
        )
        self.norm = Float32LayerNorm(config.dim, EPSILON, affine=True)
        self.conv_after_body = convolutions(config)
        # the official SwinIR's four upsamplers; "none" keeps the size
        if config.upsampler == "pixelshuffledirect":
            (factor,) = config.upsampling_factors
            self.upsample = nn.Sequential(
                convolution(config.dim, COLOURS * factor**2),
                nn.PixelShuffle(factor),
            )
        elif config.upsampler == "none":
            self.conv_last = convolution(config.dim, COLOURS)
        else:
            self._add_upsampling(config)

    def _add_upsampling(self, config: SwinirConfig) -> None:
        """Add the layers that enlarge features, for the upsamplers nearest+conv and pixelshuffle."""
        features = config.features
        self.conv_before_upsample = nn.Sequential(
            convolution(config.dim, features), nn.LeakyReLU(inplace=True)
        )
        if config.upsampler == "nearest+conv":
            for number in range(1, len(config.upsampling_factors) + 1):
                self.add_module(f"conv_up{number}", convolution(features, features))
            self.conv_hr = convolution(features, features)
        else:
            self.upsample = nn.Sequential()
            for factor in config.upsampling_factors:
                self.upsample.append(convolution(features, features * factor**2))
                self.upsample.append(nn.PixelShuffle(factor))
        self.conv_last = convolution(features, COLOURS)

    @property
    def repeated_blocks(self) -> tuple[nn.Module, ...]:
        """Blocks of the same shape, which share one compilation."""
        return tuple(module for module in self.modules() if isinstance(module, Block))

    def forward(self, x: Tensor) -> Tensor:
        """Return images upscaled by the factor f, B 3 fH fW, not clamped.

        Args:
            x: Images, B 3 H W, 0..1, with H and W multiples of the window.
        """
        mean = tensor_on(x.device, MEAN, x.dtype).view(1, COLOURS, 1, 1)
        x = (x - mean) * self.config.pixel_range
        shallow_features = self.conv_first(x)
        tokens = as_tokens(shallow_features)
        index = relative_position_index(self.config.window, x.device)
        tokens = self.patch_embed["norm"](tokens).to(x.dtype)
        for layer in self.layers:
            tokens = layer(tokens, index)
        tokens = self.norm(tokens).to(x.dtype)
        features = self.conv_after_body(as_map(tokens)) + shallow_features
        del shallow_features, tokens  # enlarging takes most memory
        if self.config.upsampler == "none":  # same size: the network predicts the change
            enlarged = x + self.conv_last(features)
        else:
            enlarged = self._enlarge(features)
        return enlarged / self.config.pixel_range + mean

    def _enlarge(self, features: Tensor) -> Tensor:
        if self.config.upsampler == "pixelshuffledirect":
            return self.upsample(features)
        features = self.conv_before_upsample(features)
        if self.config.upsampler == "pixelshuffle":
            return self.conv_last(self.upsample(features))
        for number in range(1, len(self.config.upsampling_factors) + 1):
            convolve = self.get_submodule(f"conv_up{number}")
            # nested, so that the largest tensors are freed as soon as they may be
            features = leaky_relu(convolve(repeat_pixels(features, 2)), 0.2, inplace=True)
        return self.conv_last(leaky_relu(self.conv_hr(features), 0.2, inplace=True))


def relative_position_index(window: int, device: torch.device) -> Tensor:
    """Return which row of the bias table applies to each pair of tokens in a window, N N."""
    positions = torch.arange(window, device=device)
    rows = positions.repeat_interleave(window)
    columns = positions.repeat(window)
    down = rows[:, None] - rows[None] + window - 1
    across = columns[:, None] - columns[None] + window - 1
    return down * (2 * window - 1) + across
