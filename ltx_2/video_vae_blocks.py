"""Layers of LTX-2's video VAE. They process a clip in chunks; a `ClipMemory` keeps frames between these.

A layer sees 3x3x3 neighborhoods or single pixels, and nothing of the whole clip. So any chunks give the
result of the whole clip, and each frame is computed once. Layers of the decoder look one frame ahead: such a
layer returns one frame less of the first chunk, and the missing one when it is given None, the end of the
clip.

Module names follow the official checkpoint. Source: the released VAEs of LTX-2 and LTX-2.3.
"""
# Letters: B batch, C channels, T frames of the chunk, H height, W width (at the layer's own resolution)

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from modules.layers.convolution import conv3d, empty_clip, memory_formats

KERNEL = 3  # size of every convolution
EPS = 1e-8  # in every norm
Factors = tuple[int, int, int]  # for time, height, width


@dataclass(frozen=True)
class BlockGroup:
    """A group of residual blocks of equal width."""

    width: int
    count: int


@dataclass(frozen=True)
class Resampling:
    """Change of resolution that moves blocks of pixels to channels, or back."""

    width_in: int
    width_out: int
    factors: Factors
    is_residual: bool  # whether a shortcut without weights is added

    def has_shortcut(self, is_down: bool) -> bool:
        """Return whether the channel counts allow a shortcut: averages going down, repetitions going up."""
        block = prod(self.factors)
        if is_down:  # averages groups of channels
            return self.width_in * block % self.width_out == 0
        return self.width_in % block == 0 and self.width_out * block % self.width_in == 0  # repeats channels


@dataclass(frozen=True)
class CoderConfig:
    """Dimensions of a VAE's encoder or decoder."""

    channels_in: int  # number of input channels
    width_in: int
    parts: tuple[BlockGroup | Resampling, ...]  # the last one a group
    last_width: int
    width_out: int
    is_causal: bool  # whether no frame depends on a later one
    reflects: bool = False  # whether borders are padded by reflection; otherwise by zeros

    @property
    def resamplings(self) -> tuple[Resampling, ...]:
        """Return the changes of resolution, in computing order."""
        return tuple(part for part in self.parts if isinstance(part, Resampling))

    @property
    def factors(self) -> Factors:
        """Return the product of all resampling factors: frames, rows, columns."""
        frames, rows, columns = (prod(part.factors[axis] for part in self.resamplings) for axis in range(3))
        return frames, rows, columns


@dataclass(frozen=True)
class VideoVaeConfig:
    """Dimensions of a VAE, read from a checkpoint's tensors."""

    latent_channels: int
    patch: int  # rows and columns of pixels that the first layer folds into channels
    encoder: CoderConfig
    decoder: CoderConfig

    @property
    def stride(self) -> Factors:
        """Return how many frames, rows and columns of pixels a latent covers."""
        frames, rows, columns = self.encoder.factors
        return frames, rows * self.patch, columns * self.patch


class ClipMemory:
    """Frames that layers need again for the next chunk of a clip; each clip has its own."""

    def __init__(self) -> None:
        self._frames: dict[nn.Module, Tensor] = {}
        self._started: set[nn.Module] = set()

    def take(self, layer: nn.Module) -> Tensor | None:
        """Return and remove the frames that a layer stored; None if there are none."""
        return self._frames.pop(layer, None)

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Store a copy of `frames`, so that the tensor they are part of can be freed."""
        self._frames[layer] = frames.clone()

    def starts(self, layer: nn.Module) -> bool:
        """Return whether this is the first call for a layer."""
        is_first = layer not in self._started
        self._started.add(layer)
        return is_first

    def delay(self, layer: nn.Module, x: Tensor | None, frames: int) -> Tensor:
        """Append x to the waiting frames; return the first `frames` of them, and store the rest.

        This keeps a shortcut in step with convolutions that look ahead.
        """
        parts = [part for part in (self.take(layer), x) if part is not None]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        if frames < joined.shape[2]:
            self.keep(layer, joined[:, :, frames:])
        return joined[:, :, :frames]


class ClipConv(nn.Module):
    """A 3x3x3 convolution. At both ends of a clip the outermost frame is repeated.

    With `is_normed`, each pixel is first divided by its root mean square, followed by SiLU.
    """

    def __init__(self, width_in: int, width_out: int, coder: CoderConfig, is_normed: bool = False) -> None:
        super().__init__()
        around = (0, 0, 0) if coder.reflects else (0, 1, 1)
        self.conv = nn.Conv3d(width_in, width_out, KERNEL, padding=around)
        self.before = KERNEL - 1 if coder.is_causal else 1  # number of earlier frames that the kernel covers
        self.reflects = coder.reflects
        self.is_normed = is_normed

    def forward(self, x: Tensor | None, memory: ClipMemory) -> Tensor:
        """Convolve the next frames of a clip, B C T H W to B C' T' H W; x = None ends the clip.

        Raises ValueError if borders are mirrored and height or width is 1.
        """
        if x is None:
            return self._convolve_end(memory)
        if not x.shape[2]:
            return x.new_empty(x.shape[0], self.conv.out_channels, 0, *x.shape[3:])
        joined = self._join(memory.take(self), x)
        memory.keep(self, joined[:, :, 1 - KERNEL :])
        if joined.shape[2] < KERNEL:  # the first frame of a clip waits for the second
            return x.new_empty(x.shape[0], self.conv.out_channels, 0, *x.shape[3:])
        return conv3d(self.conv, joined)

    def _join(self, frames_before: Tensor | None, x: Tensor) -> Tensor:
        """Prepend earlier frames to x, B C F H W (None: copies of its first), and mirror borders if needed.

        The result is written into one tensor, so that no concatenation copies x again.
        """
        batch, channels, frames, height, width = x.shape
        if self.reflects and min(height, width) < 2:
            raise ValueError(f"latents of {height} x {width}: this VAE mirrors borders, so it needs 2 x 2")
        edge = int(self.reflects)
        num_before = self.before if frames_before is None else frames_before.shape[2]
        size = (batch, channels, num_before + frames, height + 2 * edge, width + 2 * edge)
        joined = empty_clip(x, *size)
        current = joined[:, :, num_before:]
        # x is normalized while it is copied, if the layer has a norm
        self._write(x, current[..., edge : edge + height, edge : edge + width])
        if self.reflects:
            _mirror_borders(current)
        joined[:, :, :num_before] = current[:, :, :1] if frames_before is None else frames_before
        return joined

    def _convolve_end(self, memory: ClipMemory) -> Tensor:
        """Convolve the last frame, which has no successor, with itself repeated in its place."""
        frames_before = memory.take(self)
        assert frames_before is not None
        joined = torch.cat([frames_before, frames_before[:, :, -1:]], dim=2)
        memory.keep(self, joined[:, :, 1 - KERNEL :])
        return conv3d(self.conv, joined)

    def _write(self, x: Tensor, out: Tensor) -> None:
        """Write frames x, normalized if the layer has a norm, into the view `out`, both B C T H W."""
        if not self.is_normed:
            out.copy_(x)
            return
        # float32: in 16 bits, rounding would scale all channels of a pixel wrongly
        exact = torch.float32 if x.dtype.itemsize < 4 else x.dtype
        squares = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=exact).square_()
        scale = squares / x.shape[1] + EPS
        functional.silu(torch.mul(x, scale.rsqrt_(), out=out), inplace=True)


def _mirror_borders(x: Tensor) -> None:
    """Fill the one-pixel border of x, B C T H W, by reflection."""
    x[..., 0, :] = x[..., 2, :]
    x[..., -1, :] = x[..., -3, :]
    x[..., 0] = x[..., 2]
    x[..., -1] = x[..., -3]


class PixelResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, with a shortcut."""

    def __init__(self, width: int, coder: CoderConfig) -> None:
        super().__init__()
        self.conv1 = ClipConv(width, width, coder, is_normed=True)
        self.conv2 = ClipConv(width, width, coder, is_normed=True)

    def forward(self, x: Tensor | None, memory: ClipMemory) -> Tensor:
        """Apply the block to the next frames x, B C T H W; None marks the end of the clip."""
        h = self.conv2(self.conv1(x, memory), memory)
        if x is None:
            h = torch.cat([h, self.conv2(None, memory)], dim=2)
        return h.add_(memory.delay(self, x, h.shape[2]))


class PixelsToChannels(nn.Module):
    """Convolve, then move blocks of pixels to channels; the first frame is repeated to fill its block."""

    def __init__(self, part: Resampling, coder: CoderConfig) -> None:
        super().__init__()
        self.conv = ClipConv(part.width_in, part.width_out // prod(part.factors), coder)
        self.part = part

    def forward(self, x: Tensor, memory: ClipMemory) -> Tensor:
        """Downsample the next frames x, B C T H W."""
        if memory.starts(self):
            x = torch.cat([x[:, :, :1]] * (self.part.factors[0] - 1) + [x], dim=2)
        h = _fold(self.conv(x, memory), self.part.factors)
        return h.add_(_fold(x, self.part.factors).unflatten(1, (self.part.width_out, -1)).mean(dim=2))


class ChannelsToPixels(nn.Module):
    """Convolve, then move channels to blocks of pixels; of the first block, keep only the last frame."""

    def __init__(self, part: Resampling, coder: CoderConfig) -> None:
        super().__init__()
        self.conv = ClipConv(part.width_in, part.width_out * prod(part.factors), coder)
        self.part = part

    def forward(self, x: Tensor | None, memory: ClipMemory) -> Tensor:
        """Upsample the next frames x, B C T H W; None marks the end of the clip."""
        h = self.conv(x, memory)
        frames = h.shape[2]
        h = _unfold(h, self.part.factors)
        if self.part.is_residual:
            shortcut = _unfold(memory.delay(self, x, frames), self.part.factors)
            h.unflatten(1, (-1, shortcut.shape[1])).add_(shortcut[:, None])
        return h[:, :, self.part.factors[0] - 1 :] if frames and memory.starts(self) else h


def _fold(x: Tensor, factors: Factors) -> Tensor:
    """Move blocks of pixels to channels, B C T H W to B CIJK T/I H/J W/K, in the memory layout of x."""
    i, j, k = factors
    batch, channels, frames, height, width = x.shape
    size = (batch, channels * i * j * k, frames // i, height // j, width // k)
    folded = empty_clip(x, *size)
    blocks = x.unflatten(4, (-1, k)).unflatten(3, (-1, j)).unflatten(2, (-1, i))  # B C T/I I H/J J W/K K
    folded.unflatten(1, (channels, i, j, k)).copy_(blocks.permute(0, 1, 3, 5, 7, 2, 4, 6))
    return folded


def _unfold(x: Tensor, factors: Factors) -> Tensor:
    """Undo `_fold`: B CIJK T H W to B C TI HJ WK."""
    i, j, k = factors
    batch, channels, frames, height, width = x.shape
    size = (batch, channels // (i * j * k), frames * i, height * j, width * k)
    pixels = empty_clip(x, *size)
    blocks = pixels.unflatten(4, (width, k)).unflatten(3, (height, j)).unflatten(2, (frames, i))
    blocks.copy_(x.unflatten(1, (-1, i, j, k)).permute(0, 1, 5, 2, 6, 3, 7, 4))
    return pixels


class ResidualBlocks(nn.Module):
    """Numbered list of residual blocks, named as in the official file."""

    def __init__(self, part: BlockGroup, coder: CoderConfig) -> None:
        super().__init__()
        self.res_blocks = nn.ModuleList(PixelResidualBlock(part.width, coder) for _ in range(part.count))


def _flat(groups: nn.ModuleList) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for group in groups:
        layers += group.res_blocks if isinstance(group, ResidualBlocks) else [group]
    return layers


class VideoVaeEncoder(nn.Module):
    """Encode a clip's pixels as posterior means and one additional channel."""

    def __init__(self, config: VideoVaeConfig) -> None:
        super().__init__()
        coder = config.encoder
        self.patch = config.patch
        self.conv_in = ClipConv(coder.channels_in, coder.width_in, coder)
        self.down_blocks = nn.ModuleList(
            ResidualBlocks(part, coder) if isinstance(part, BlockGroup) else PixelsToChannels(part, coder)
            for part in coder.parts
        )
        self.conv_out = ClipConv(coder.last_width, coder.width_out, coder, is_normed=True)

    def forward(self, x: Tensor, memory: ClipMemory) -> Tensor:
        """Encode the first frame, or whole groups of later frames: B 3 T H W to B Z+1 t h w."""
        # unlike a plain unfolding, the column in a patch changes slower than the row
        x = rearrange(x, "b c t (h p) (w q) -> b (c q p) t h w", p=self.patch, q=self.patch)
        x = x.contiguous(memory_format=memory_formats(x.device)[0])
        for layer in (self.conv_in, *_flat(self.down_blocks), self.conv_out):
            x = layer(x, memory)
        return x


class VideoVaeDecoder(nn.Module):
    """Decode a clip's latents to pixels, one latent frame at a time."""

    def __init__(self, config: VideoVaeConfig) -> None:
        super().__init__()
        coder = config.decoder
        self.patch, self.is_causal = config.patch, coder.is_causal
        self.conv_in = ClipConv(coder.channels_in, coder.width_in, coder)
        self.up_blocks = nn.ModuleList(
            ResidualBlocks(part, coder) if isinstance(part, BlockGroup) else ChannelsToPixels(part, coder)
            for part in coder.parts
        )
        self.conv_out = ClipConv(coder.last_width, coder.width_out, coder, is_normed=True)

    def forward(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the pixels, B 3 T H W, of latent frames B Z 1 h w, in playing order.

        A decoder that looks ahead yields its first frames after about half a clip, and the last ones a frame
        or two at a time, while each layer in turn reaches the end of the clip. A layer never computes more
        frames at once than one latent frame makes.
        """
        layers = (self.conv_in, *_flat(self.up_blocks), self.conv_out)
        memory = ClipMemory()
        for latent in latents:
            yield from self._pixels(layers, latent, memory)
        for index, layer in enumerate(layers if not self.is_causal else ()):
            for frame in layer(None, memory).split(1, dim=2):
                yield from self._pixels(layers[index + 1 :], frame, memory)

    def _pixels(self, layers: Sequence[nn.Module], x: Tensor, memory: ClipMemory) -> Iterator[Tensor]:
        for layer in layers:
            if not x.shape[2]:
                return
            x = layer(x, memory)
        if x.shape[2]:
            yield rearrange(x, "b (c q p) t h w -> b c t (h p) (w q)", p=self.patch, q=self.patch)
