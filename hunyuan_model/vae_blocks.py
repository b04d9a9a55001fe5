"""Layers of the HunyuanVideo video VAE: causal convolutions and group norms over a whole clip.

A group norm needs every frame of a clip, so the features of the whole clip are in memory between two layers.
Layers work on a few frames at a time: larger temporary tensors (normalized, padded, enlarged copies) exist
only for these, and results are written or added into the output. The number of frames at a time changes
results by rounding only.

Module names follow the published checkpoint. Source: the released VAE of HunyuanVideo (arXiv 2412.03603,
section 4.1).
"""
# Letters: B batch, C channels, T frames, H height, W width (at the layer's own resolution)

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from modules.attention.attend import attend
from modules.devices import tensor_on
from modules.integers import ceil_div
from modules.layers.convolution import conv3d, empty_clip

KERNEL = 3  # size of every convolution that is not pointwise
EPS = 1e-6  # in every group norm
STEP_ELEMENTS = 1 << 26  # number of values computed at a time if no number of frames is given
Factors = tuple[int, int, int]  # for time, height, width


@dataclass(frozen=True)
class HunyuanVaeConfig:
    """Dimensions of a VAE, read from a checkpoint's tensors."""

    latent_channels: int
    groups: int  # in every group norm
    encoder: tuple[int, ...]  # channels of each level, in computing order
    encoder_blocks: int  # residual blocks in a level
    decoder: tuple[int, ...]
    decoder_blocks: int


# Change of resolution after each level but the last
DOWN: tuple[Factors, ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
UP: tuple[Factors, ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2))


def frame_ranges(frames: int, values: int, chunk: int | None) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of groups of `chunk` frames, or of as many frames as fit into STEP_ELEMENTS.

    `values` is the number of values in a frame.
    """
    size = chunk or max(1, STEP_ELEMENTS // max(1, values))
    for start in range(0, frames, size):
        yield start, min(start + size, frames)


class ClipNorm(nn.GroupNorm):
    """Group norm over all frames of a clip, in float32.

    It returns a factor and an offset for each channel and leaves applying them to the caller.
    """

    def __init__(self, groups: int, width: int) -> None:
        super().__init__(groups, width, eps=EPS)

    def scale_and_offset(self, x: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
        """Return factor and offset, B C 1 1 1 float32, so that x * factor + offset is the normalized clip.

        `x` is B C T H W, processed in chunks of `chunk` frames.
        """
        groups = (self.num_groups, -1)
        mean, variance = self._statistics(x, chunk)  # B groups 1
        weight = self.weight.float().unflatten(0, groups)
        bias = self.bias.float().unflatten(0, groups)
        factor = weight * torch.rsqrt(variance + self.eps)
        offset = bias - mean * factor
        return factor.flatten(1)[..., None, None, None], offset.flatten(1)[..., None, None, None]

    def _statistics(self, x: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
        """Return the mean and variance of each channel group, B groups 1, computed in pieces of the clip."""
        # The variance is the mean of the variances plus the variance of the means, over pieces and channels.
        piece_means, piece_variances, shares = [], [], []
        # pieces of frames, because a copy of the whole clip in float32 would be large
        for start, stop in frame_ranges(x.shape[2], x[:, :, 0].numel(), chunk):
            piece = x[:, :, start:stop].float()
            piece_mean = piece.mean(dim=(2, 3, 4), keepdim=True)
            piece_variances.append((piece - piece_mean).square_().mean(dim=(2, 3, 4)))
            piece_means.append(piece_mean.flatten(1))
            shares.append((stop - start) / x.shape[2])
        groups = (self.num_groups, -1)
        # fraction of the frames in each piece
        share = tensor_on(x.device, shares, torch.float32).view(-1, 1, 1, 1)
        means = torch.stack(piece_means).unflatten(2, groups)  # pieces B groups channels
        variances = torch.stack(piece_variances).unflatten(2, groups)
        mean = (share * means).sum(dim=0).mean(dim=-1, keepdim=True)
        squares = share * (variances + (means - mean).square())
        variance = squares.sum(dim=0).mean(dim=-1, keepdim=True)
        return mean, variance


class HunyuanCausalConv(nn.Module):
    """A causal 3x3x3 convolution, whose output depends on no later frame.

    It pads by repeating the border of the frame and the first frame of the clip.

    Args:
        kernel: 1 for a pointwise convolution.
        enlarge: How often each pixel is repeated along each axis before the convolution. The first frame is
            not repeated in time.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        kernel: int = KERNEL,
        stride: Factors = (1, 1, 1),
        enlarge: Factors = (1, 1, 1),
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width_in, width_out, kernel, stride)
        self.enlarge = enlarge

    def forward(
        self, x: Tensor, chunk: int | None, norm: ClipNorm | None = None, accumulator: Tensor | None = None
    ) -> Tensor:
        """Convolve x, B C T H W to B C' T' H' W'.

        Args:
            x: The clip.
            chunk: Number of frames to compute at a time.
            norm: Norm to apply first, followed by SiLU.
            accumulator: Tensor to add the result to in place, and to return.
        """
        scale_and_offset = None if norm is None else norm.scale_and_offset(x, chunk)
        frames, height, width = self._sizes(x)
        channels = max(self.conv.in_channels, self.conv.out_channels)
        output = None
        for start, stop in frame_ranges(frames, channels * height * width, chunk):
            piece = self._convolve(self._pad(x, start, stop, scale_and_offset))
            if accumulator is not None:
                accumulator[:, :, start:stop].add_(piece)
                continue
            if stop - start == frames:  # the only piece
                return piece
            if output is None:  # allocated now, because the first piece shows the batch size and channels
                output = empty_clip(x, *piece.shape[:2], frames, height, width)
            output[:, :, start:stop].copy_(piece)
        result = output if accumulator is None else accumulator
        assert result is not None
        return result

    def _sizes(self, x: Tensor) -> list[int]:
        """Return frames, height and width of the result; the first frame is never repeated in time."""
        frames, height, width = x.shape[2:]
        repeats, rows, columns = self.enlarge
        enlarged = (1 + (frames - 1) * repeats, height * rows, width * columns)
        sizes = []
        for size, step in zip(enlarged, self.conv.stride, strict=True):
            sizes.append((size - 1) // step + 1)
        return sizes

    def _pad(
        self, x: Tensor, start: int, stop: int, scale_and_offset: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Return the padded input for result frames `start` to `stop`, B C T H+2 W+2; T is 1 for an image."""
        # a convolution of single pixels needs no padding
        if self.conv.kernel_size[0] == 1:
            return x[:, :, start:stop]
        sources = self._list_source_frames(start, stop) if x.shape[2] > 1 else [0]
        _, rows, columns = self.enlarge  # factors by which frames are enlarged before the convolution
        batch, channels, _, height, width = x.shape
        size = (batch, channels, len(sources), height * rows + 2, width * columns + 2)
        padded = empty_clip(x, *size)
        for index, source in enumerate(sources):
            # a repeated frame is copied, which is cheaper than normalizing and enlarging it again
            if index and source == sources[index - 1]:
                padded[:, :, index] = padded[:, :, index - 1]
            else:
                frame = x[:, :, source : source + 1]
                self._write(frame, padded[:, :, index : index + 1], scale_and_offset)
        return padded

    def _write(self, frame: Tensor, out: Tensor, scale_and_offset: tuple[Tensor, Tensor] | None) -> None:
        """Write a frame, B C 1 H W, into `out`: normalized, enlarged and with its border repeated."""
        if scale_and_offset is not None:
            factor, offset = scale_and_offset
            frame = functional.silu(torch.addcmul(offset, frame.float(), factor), inplace=True)
        _, rows, columns = self.enlarge
        height, width = frame.shape[3:]
        inside = out[..., 1:-1, 1:-1].unflatten(-1, (width, columns)).unflatten(-3, (height, rows))
        inside.copy_(frame[..., :, None, :, None])
        _repeat_borders(out.squeeze(2))

    def _list_source_frames(self, start: int, stop: int) -> list[int]:
        """Return the input frames for results `start` to `stop`; the first frame also pads the start."""
        step = self.conv.stride[0]
        frames = range(start * step - KERNEL + 1, (stop - 1) * step + 1)
        return [ceil_div(max(0, frame), self.enlarge[0]) for frame in frames]

    def _convolve(self, padded: Tensor) -> Tensor:
        conv = self.conv
        if padded.shape[2] == 1:  # an image: all three taps in time see the same frame
            weight = conv.weight.float().sum(dim=2).to(conv.weight.dtype)
            return functional.conv2d(padded.squeeze(2), weight, conv.bias, conv.stride[1:]).unsqueeze(2)
        return conv3d(conv, padded)


def _repeat_borders(frames: Tensor) -> None:
    """Fill the border of an image, B C H W, in place with the rows and columns next to it."""
    frames[..., 0, :] = frames[..., 1, :]
    frames[..., -1, :] = frames[..., -2, :]
    frames[..., 0] = frames[..., 1]
    frames[..., -1] = frames[..., -2]


class HunyuanResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, with a shortcut.

    The input is overwritten if it is the shortcut itself.
    """

    def __init__(self, width_in: int, width_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = ClipNorm(groups, width_in)
        self.conv1 = HunyuanCausalConv(width_in, width_out)
        self.norm2 = ClipNorm(groups, width_out)
        self.conv2 = HunyuanCausalConv(width_out, width_out)
        self.conv_shortcut = (
            HunyuanCausalConv(width_in, width_out, kernel=1) if width_in != width_out else None
        )

    def forward(self, x: Tensor, chunk: int | None) -> Tensor:
        """Apply the block to x, B C T H W to B C' T H W, `chunk` frames at a time."""
        h = self.conv1(x, chunk, self.norm1)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x, chunk)
        return self.conv2(h, chunk, self.norm2, accumulator=shortcut)


class HunyuanFrameAttention(nn.Module):
    """One-head attention of each pixel to its own and all earlier frames, added to the input in place."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = ClipNorm(groups, width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, chunk: int | None) -> Tensor:
        """Add the attention to x, B C T H W, in place, and return x."""
        factor, offset = self.group_norm.scale_and_offset(x, chunk)
        normed = torch.addcmul(offset, x.float(), factor).to(x.dtype)
        tokens = normed.permute(0, 2, 3, 4, 1).flatten(2, 3)  # B T H*W C
        q, k, v = (layer(tokens).unsqueeze(3) for layer in (self.to_q, self.to_k, self.to_v))  # B T H*W 1 C
        # frame by frame, because a mask for a long clip would fill the memory
        for frame in range(x.shape[2]):
            keys = k[:, : frame + 1].flatten(1, 2)
            values = v[:, : frame + 1].flatten(1, 2)
            attended = attend(q[:, frame], keys, values).squeeze(2)  # B H*W C
            x[:, :, frame] += self.to_out[0](attended).transpose(1, 2).unflatten(2, x.shape[3:])
        return x


class Resample(nn.Module):
    """A convolution that changes the resolution."""

    def __init__(self, width: int, stride: Factors = (1, 1, 1), enlarge: Factors = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = HunyuanCausalConv(width, width, stride=stride, enlarge=enlarge)

    def forward(self, x: Tensor, chunk: int | None) -> Tensor:
        """Return the convolution of x, B C T H W, at the new resolution."""
        return self.conv(x, chunk)


class CausalLevel(nn.Module):
    """Residual blocks of one resolution, then down- or upsampling if `down` or `up` is set."""

    def __init__(
        self,
        width_in: int,
        width: int,
        blocks: int,
        groups: int,
        down: Factors | None = None,
        up: Factors | None = None,
    ) -> None:
        """Build `blocks` residual blocks; `down` and `up` are factors for frames, rows and columns."""
        super().__init__()
        self.resnets = nn.ModuleList(
            HunyuanResidualBlock(width_in if index == 0 else width, width, groups) for index in range(blocks)
        )
        # lists of at most one layer, because names in files have an index (`downsamplers.0`)
        self.downsamplers = nn.ModuleList([] if down is None else [Resample(width, stride=down)])
        self.upsamplers = nn.ModuleList([] if up is None else [Resample(width, enlarge=up)])

    def forward(self, x: Tensor, chunk: int | None) -> Tensor:
        """Apply all layers to x, B C T H W, `chunk` frames at a time."""
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x, chunk)
        return x


class CausalMiddle(nn.Module):
    """Layers at the lowest resolution: a residual block, attention, and another residual block."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([HunyuanFrameAttention(width, groups)])
        self.resnets = nn.ModuleList(
            [HunyuanResidualBlock(width, width, groups), HunyuanResidualBlock(width, width, groups)]
        )

    def forward(self, x: Tensor, chunk: int | None) -> Tensor:
        """Apply the three layers to x, B C T H W."""
        x = self.attentions[0](self.resnets[0](x, chunk), chunk)
        return self.resnets[1](x, chunk)


class HunyuanVaeEncoder(nn.Module):
    """Encode pixels B 3 T H W as features of means and log variances B 2Z t h w."""

    def __init__(self, config: HunyuanVaeConfig) -> None:
        super().__init__()
        widths, groups = config.encoder, config.groups
        self.conv_in = HunyuanCausalConv(3, widths[0])
        self.down_blocks = nn.ModuleList(
            CausalLevel(before, width, config.encoder_blocks, groups, down=down)
            for before, width, down in _list_levels(widths, DOWN)
        )
        self.mid_block = CausalMiddle(widths[-1], groups)
        self.conv_norm_out = ClipNorm(groups, widths[-1])
        self.conv_out = HunyuanCausalConv(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor, chunk: int | None) -> Tensor:
        """Return means and log variances, B 2Z t h w, of pixels x, B 3 T H W."""
        x = self.conv_in(x, chunk)
        for level in self.down_blocks:
            x = level(x, chunk)
        return self.conv_out(self.mid_block(x, chunk), chunk, self.conv_norm_out)


class HunyuanVaeDecoder(nn.Module):
    """Decode features of latents B Z t h w to pixels B 3 T H W."""

    def __init__(self, config: HunyuanVaeConfig) -> None:
        super().__init__()
        widths, groups = config.decoder, config.groups
        self.conv_in = HunyuanCausalConv(config.latent_channels, widths[0])
        self.mid_block = CausalMiddle(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            CausalLevel(before, width, config.decoder_blocks, groups, up=up)
            for before, width, up in _list_levels(widths, UP)
        )
        self.conv_norm_out = ClipNorm(groups, widths[-1])
        self.conv_out = HunyuanCausalConv(widths[-1], 3)

    def forward(self, x: Tensor, chunk: int | None) -> Tensor:
        """Return pixels, B 3 T H W, of latents x, B Z t h w."""
        x = self.mid_block(self.conv_in(x, chunk), chunk)
        for level in self.up_blocks:
            x = level(x, chunk)
        return self.conv_out(x, chunk, self.conv_norm_out)


def _list_levels(
    widths: Sequence[int], changes: Sequence[Factors]
) -> Iterator[tuple[int, int, Factors | None]]:
    """Yield each level's input width, output width and final resampling (None at the last level)."""
    return zip((widths[0], *widths[:-1]), widths, (*changes, None), strict=True)
