"""Tiled encoding and decoding: overlapping tiles joined by linear ramps; and samples of the posterior.

There are two ways to tile:
- `compute_in_tiles` and `compute_in_spans` tile as the released VAE of HunyuanVideo does (`enable_tiling`). A
  tile begins every three quarters of a tile, even if the last one is very short. In the overlap, a tile fades
  in over the tile above it, then over the tile to its left.
- `tiles` cuts an axis into tiles of equal size, and their weighted results are added.

Sizes are in units that input and output share: latent frames or latent pixels. A unit is a number of frames
or pixels in the input, and another number in the output.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import torch
from torch import Tensor

from modules.layers.convolution import Compute, compute_piece
from modules.seeds import derive_seed


@dataclass(frozen=True)
class Cut:
    """How an axis is cut into overlapping tiles; a unit is a latent pixel or a latent frame."""

    size: int  # units of a tile
    unit_in: int  # frames or pixels of a unit in the input
    unit_out: int  # frames or pixels of a unit in the output

    @property
    def stride(self) -> int:
        """Distance between the starts of neighboring tiles; a quarter of a tile overlaps the next one."""
        return int(self.size * 0.75)

    def pick(self, start: int) -> slice:
        """Return the slice of the input's axis for the tile that begins at latent pixel or frame `start`."""
        return slice(start * self.unit_in, (start + self.size) * self.unit_in)


def compute_in_tiles(compute: Compute, x: Tensor, cut: Cut, device: torch.device) -> Tensor:
    """Apply `compute` to x, ... H W, tile by tile in height and width.

    Returns ... H' W', float32, on `device`.
    """
    height = x.shape[-2] // cut.unit_in
    width = x.shape[-1] // cut.unit_in
    step = cut.stride * cut.unit_out  # distance between tiles in the output; the rest of a tile overlaps
    out = torch.empty(0)  # allocated once the first tile shows its channels
    above: dict[int, Tensor] = {}  # left edge -> this tile's first rows as the tile above computed them
    for top in range(0, height, cut.stride):
        on_left = torch.empty(0)  # this tile's first columns as the tile to its left computed them
        for left in range(0, width, cut.stride):
            tile = compute_piece(compute, x[..., cut.pick(top), cut.pick(left)]).float()
            if top:
                _fade_in(tile, above[left], -2)
            if left:
                _fade_in(tile, on_left, -1)
            above[left] = tile[..., step:, :].clone()
            on_left = tile[..., step:].clone()
            if not top and not left:
                shape = (*tile.shape[:-2], height * cut.unit_out, width * cut.unit_out)
                out = torch.empty(shape, device=device)
            tile = tile[..., :step, :step]
            remaining = out[..., top * cut.unit_out :, left * cut.unit_out :]
            remaining[..., : tile.shape[-2], : tile.shape[-1]] = tile
            del tile  # freed before the next one is computed
    return out


def compute_in_spans(compute: Compute, x: Tensor, cut: Cut) -> Iterator[Tensor]:
    """Apply `compute` to x, B C F H W, in spans of frames.

    Yields B C' F' H' W' in order and without overlaps. Causal video VAEs treat the first frame of a clip as a
    unit of its own. So each later span begins with the frame before it, whose result is dropped.
    """
    num_units = (x.shape[2] - 1) // cut.unit_in  # without the first frame
    overlap = torch.empty(0)  # the end of the previous span, which this span computes again
    for start in range(0, num_units, cut.stride):
        # `+ 1`: with the frame before the span, or the clip's first frame
        span = compute(x[:, :, start * cut.unit_in : (start + cut.size) * cut.unit_in + 1])
        if start:
            span = span[:, :, 1:]
            # axis 2: the frames
            _fade_in(span, overlap, 2)
        num_first = 0 if start else 1  # only the first span still has the single first frame
        end = cut.stride * cut.unit_out + num_first
        overlap = span[:, :, end:].clone()
        yield span[:, :, :end]
        del span  # freed before the next one is computed


def _fade_in(tile: Tensor, previous: Tensor, axis: int) -> None:
    """Blend the start of `tile` along an axis, in place, with the end of `previous`, which it overlaps."""
    length = min(tile.shape[axis], previous.shape[axis])
    tile_start = tile.narrow(axis, 0, length)
    previous_end = previous.narrow(axis, previous.shape[axis] - length, length)
    ramp_shape = [1] * tile.ndim
    ramp_shape[axis] = length
    ramp = (torch.arange(length, device=tile.device) / max(1, length)).view(ramp_shape)
    tile_start.copy_(previous_end.lerp(tile_start, ramp))


OVERLAP = 4  # a tile shares 1 / OVERLAP of its length with its neighbor


@dataclass(frozen=True)
class Tile:
    """One tile of an axis; all fields are in latent pixels, the unit that input and output share."""

    start: int
    size: int
    before: int  # overlap with the previous tile
    after: int  # overlap with the next tile

    def pick(self, unit: int) -> slice:
        """Return the slice of this tile along an axis with `unit` pixels per latent pixel."""
        return slice(self.start * unit, (self.start + self.size) * unit)

    def weights(self, unit: int) -> Tensor:
        """Return the weight of this tile for each pixel: 1 inside, a linear ramp in the overlaps.

        The weights of overlapping tiles sum to 1.
        """
        length = self.size * unit
        rise = self.before * unit
        fall = self.after * unit
        weights = torch.ones(length)
        weights[:rise] = _make_ramp(rise)
        weights[length - fall :] = _make_ramp(fall).flip(0)
        return weights


def _make_ramp(length: int) -> Tensor:
    return (torch.arange(length) + 0.5) / length


def tiles(size: int, largest: int) -> tuple[Tile, ...]:
    """Cover `size` latent pixels with equal tiles of at most `largest`.

    Neighbors overlap by about a quarter of `largest`, and by at least one latent pixel if a tile has two or
    more.
    """
    if size <= largest:
        return (Tile(0, size, before=0, after=0),)
    min_overlap = max(largest // OVERLAP, min(largest - 1, 1))
    # `count` tiles cover count * length - (count - 1) * overlap
    # the fewest tiles that cover the size, and then their smallest equal length
    count = ceil((size - min_overlap) / (largest - min_overlap))
    length = ceil((size + (count - 1) * min_overlap) / count)
    # spread evenly from 0 to size - length
    starts = [(size - length) * index // (count - 1) for index in range(count)]
    # overlap before each tile, and 0 after the last one
    overlaps = [0, *(first + length - second for first, second in pairwise(starts)), 0]
    result = []
    for index, start in enumerate(starts):
        result.append(Tile(start, length, before=overlaps[index], after=overlaps[index + 1]))
    return tuple(result)


def add_in_tiles(
    compute: Callable[[Tensor], Iterable[Tensor]],
    x: Tensor,
    cuts: tuple[Sequence[Tile], Sequence[Tile]],
    units: tuple[int, int],
    out: Tensor,
) -> None:
    """Compute all tiles of an input and add their weighted results to `out`.

    Args:
        compute: Returns the frames of a tile in order, in one or several pieces.
        x: Input, B C F H W.
        cuts: Tiles of the height and of the width.
        units: Side of a latent pixel in pixels of `x` and in pixels of `out`.
        out: Output, B C' F' H' W', filled with zeros.
    """
    unit_in, unit_out = units
    rows, columns = cuts
    for row in rows:
        for column in columns:
            tile = x[..., row.pick(unit_in), column.pick(unit_in)]
            region = out[..., row.pick(unit_out), column.pick(unit_out)]
            # tiles overlap: their weights fade out towards the edges and add up to 1
            weights = (row.weights(unit_out)[:, None] * column.weights(unit_out)).to(out.device)
            start = 0
            for piece in compute(tile):
                end = start + piece.shape[2]
                frames = region[:, :, start:end]
                frames += piece.to(out.device, out.dtype) * weights
                start = end


def decode_in_tiles(
    decode: Callable[[Tensor], Iterator[Tensor]],
    latents: Tensor,
    cuts: tuple[Sequence[Tile], Sequence[Tile]],
    stride: tuple[int, int, int],
) -> Iterator[Tensor]:
    """Yield pixels, B 3 F H W, in playing order.

    If there are several tiles, all pixels are collected in host memory first.

    Args:
        decode: Returns the frames of a tile in order, in one or several pieces.
        latents: B Z f h w.
        cuts: Tiles of the height and of the width.
        stride: Size of a latent pixel: frames, height, width.
    """
    if all(len(cut) == 1 for cut in cuts):
        yield from decode(latents)
        return
    frames_per_latent, side, _ = stride
    batch, _, latent_frames, height, width = latents.shape
    # the first latent frame is a single frame of the clip
    frame_counts = [1] + [frames_per_latent] * (latent_frames - 1)
    pixels = torch.zeros(batch, 3, sum(frame_counts), height * side, width * side)
    add_in_tiles(decode, latents, cuts, units=(1, side), out=pixels)
    yield from pixels.split(frame_counts, dim=2)


def posterior_generator(owner: int | str) -> torch.Generator:
    """Return the generator for the posterior sample of a clip or an image.

    `owner` is the name of the cached item, so that its cache does not depend on other items of the run. In
    generation, it is the seed.
    """
    return torch.Generator().manual_seed(derive_seed("posterior", owner))


def sample_posterior(
    moments: Tensor, generators: Sequence[torch.Generator], limits: tuple[float, float] | None = None
) -> Tensor:
    """Return a sample of each posterior, B Z ... float32, on the device of `moments`.

    Args:
        moments: Means and log-variances along the channel axis, B 2Z ... float32; overwritten.
        generators: One generator for each item; noise is drawn in float32 on its device.
        limits: Lowest and highest log-variance; None for no clamping.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    if limits is not None:
        log_variance.clamp_(*limits)
    # computed in place, because the latents of a long clip are large
    # exp(log(variance) / 2)
    deviation = log_variance.mul_(0.5).exp_()
    for index, generator in enumerate(generators):
        noise = torch.randn(mean.shape[1:], generator=generator, device=generator.device)
        mean[index] += deviation[index].mul_(noise.to(mean.device))
    return mean.contiguous()
