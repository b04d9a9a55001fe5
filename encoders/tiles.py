"""Tiled encoding and decoding: overlapping tiles joined by linear ramps; and samples of the posterior.

There are two ways to tile:
- `compute_in_tiles` and `compute_in_spans` tile as the released VAE of HunyuanVideo does (`enable_tiling`). A
  tile begins every three quarters of a tile, even if the last one is very short. In the overlap, a tile fades
  in over the tile above it, then over the tile to its left.
- `split_into_tiles` cuts an axis into tiles of equal size, and their weighted results are added.

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
class AxisTiling:
    """How to split an axis into overlapping tiles; sizes and starts are in latent pixels or latent frames."""

    size: int  # length of a tile
    pixels_in: int  # pixels or frames of the input for each latent pixel or frame
    pixels_out: int  # pixels or frames of the output for each latent pixel or frame

    @property
    def stride(self) -> int:
        """Distance between the starts of neighboring tiles, which overlap by a quarter of a tile."""
        return int(self.size * 0.75)

    def input_slice(self, start: int) -> slice:
        """Return the input slice of the tile that starts at latent pixel or frame `start`."""
        return slice(start * self.pixels_in, (start + self.size) * self.pixels_in)


def compute_in_tiles(compute: Compute, x: Tensor, tiling: AxisTiling, device: torch.device) -> Tensor:
    """Apply `compute` to x, ... H W, in overlapping tiles that are blended.

    1. Compute a tile; blend its top with the tile above, and its left with the tile to its left.
    2. Keep its bottom and its right edge, which the next tiles overlap.
    3. Write the rest to the result.

    Returns ... H' W', float32, on `device`.
    """
    height = x.shape[-2] // tiling.pixels_in  # in latent pixels, as `top` and `left`
    width = x.shape[-1] // tiling.pixels_in
    step = tiling.stride * tiling.pixels_out  # distance between tiles in the output; the rest overlaps
    out = torch.empty(0)  # allocated when the first tile's channels are known
    bottoms: dict[int, Tensor] = {}  # overlapping rows of the tiles above, by `left`
    for top in range(0, height, tiling.stride):
        right = torch.empty(0)  # overlapping columns of the previous tile
        for left in range(0, width, tiling.stride):
            tile_input = x[..., tiling.input_slice(top), tiling.input_slice(left)]
            tile = compute_piece(compute, tile_input).float()
            if top:
                _fade_in(tile, bottoms[left], -2)
            if left:
                _fade_in(tile, right, -1)
            bottoms[left] = tile[..., step:, :].clone()
            right = tile[..., step:].clone()
            if not top and not left:
                shape = (*tile.shape[:-2], height * tiling.pixels_out, width * tiling.pixels_out)
                out = torch.empty(shape, device=device)
            tile = tile[..., :step, :step]
            first_row = top * tiling.pixels_out
            first_column = left * tiling.pixels_out
            rows = slice(first_row, first_row + tile.shape[-2])
            columns = slice(first_column, first_column + tile.shape[-1])
            out[..., rows, columns] = tile
            del tile, tile_input  # freed before the next tile is computed
    return out


def compute_in_spans(compute: Compute, x: Tensor, tiling: AxisTiling) -> Iterator[Tensor]:
    """Apply `compute` to x, B C F H W, in spans of frames.

    Yields B C' F' H' W' in order and without overlaps. Causal video VAEs treat a clip's first frame
    separately, so each later span starts with the frame before it, whose result is dropped.
    """
    num_latent_frames = (x.shape[2] - 1) // tiling.pixels_in  # without the first frame
    previous_end = torch.empty(0)  # frames of the previous span that this span computes again
    for start in range(0, num_latent_frames, tiling.stride):
        # `+ 1`: with the frame before the span, or the clip's first frame
        last = (start + tiling.size) * tiling.pixels_in + 1
        span = compute(x[:, :, start * tiling.pixels_in : last])
        if start:
            span = span[:, :, 1:]
            _fade_in(span, previous_end, axis=2)
        num_first = 0 if start else 1  # only the first span still has the single first frame
        end = tiling.stride * tiling.pixels_out + num_first
        previous_end = span[:, :, end:].clone()
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
    """One tile of an axis; all fields are in latent pixels, the unit shared by input and output."""

    start: int
    size: int
    before: int  # overlap with the previous tile
    after: int  # overlap with the next tile

    def pixel_slice(self, pixels_per_latent: int) -> slice:
        """Return this tile's slice of an axis that has `pixels_per_latent` pixels per latent pixel."""
        return slice(self.start * pixels_per_latent, (self.start + self.size) * pixels_per_latent)

    def weights(self, pixels_per_latent: int) -> Tensor:
        """Return this tile's blend weight for each pixel: 1 inside, a linear ramp in the overlaps.

        The weights of overlapping tiles sum to 1.
        """
        length = self.size * pixels_per_latent
        rise = self.before * pixels_per_latent
        fall = self.after * pixels_per_latent
        weights = torch.ones(length)
        weights[:rise] = _make_ramp(rise)
        weights[length - fall :] = _make_ramp(fall).flip(0)
        return weights


def _make_ramp(length: int) -> Tensor:
    return (torch.arange(length) + 0.5) / length


def split_into_tiles(size: int, largest: int) -> tuple[Tile, ...]:
    """Cover an axis of `size` latent pixels with equal tiles of at most `largest`.

    Neighbors overlap by about a quarter of `largest`, and by at least one latent pixel if a tile has two or
    more.
    """
    if size <= largest:
        return (Tile(0, size, before=0, after=0),)
    min_overlap = max(largest // OVERLAP, min(largest - 1, 1))
    # n tiles cover n * length - (n - 1) * overlap: take the fewest tiles, and then their smallest length
    num_tiles = ceil((size - min_overlap) / (largest - min_overlap))
    length = ceil((size + (num_tiles - 1) * min_overlap) / num_tiles)
    last_start = size - length
    starts = [last_start * index // (num_tiles - 1) for index in range(num_tiles)]  # spread evenly
    overlaps = [start + length - next_start for start, next_start in pairwise(starts)]
    tiles = []
    for start, before, after in zip(starts, [0, *overlaps], [*overlaps, 0], strict=True):
        tiles.append(Tile(start, length, before=before, after=after))
    return tuple(tiles)


def add_in_tiles(
    compute: Callable[[Tensor], Iterable[Tensor]],
    x: Tensor,
    tiles: tuple[Sequence[Tile], Sequence[Tile]],
    pixels_per_latent: tuple[int, int],
    out: Tensor,
) -> None:
    """Compute all tiles of an input and add their weighted results to `out`.

    Args:
        compute: Returns the frames of a tile in order, in one or several pieces.
        x: Input, B C F H W.
        tiles: Tiles of the height and of the width.
        pixels_per_latent: Edge length of a latent pixel, in pixels of `x` and in pixels of `out`.
        out: Output, B C' F' H' W', filled with zeros.
    """
    pixels_in, pixels_out = pixels_per_latent
    row_tiles, column_tiles = tiles
    for row in row_tiles:
        for column in column_tiles:
            tile_input = x[..., row.pixel_slice(pixels_in), column.pixel_slice(pixels_in)]
            tile_output = out[..., row.pixel_slice(pixels_out), column.pixel_slice(pixels_out)]
            # weights fade out towards the edges and sum to 1 where tiles overlap
            weights = (row.weights(pixels_out)[:, None] * column.weights(pixels_out)).to(out.device)
            start = 0
            for piece in compute(tile_input):  # some frames of the tile
                end = start + piece.shape[2]
                frames = tile_output[:, :, start:end]
                frames += piece.to(out.device, out.dtype) * weights
                start = end


def decode_in_tiles(
    decode: Callable[[Tensor], Iterator[Tensor]],
    latents: Tensor,
    tiles: tuple[Sequence[Tile], Sequence[Tile]],
    stride: tuple[int, int, int],
) -> Iterator[Tensor]:
    """Decode latents tile by tile; yield groups of frames, B 3 F H W, in playing order.

    If there are several tiles, all pixels are collected in host memory first.

    Args:
        decode: Returns the frames of a tile in order, in one or several pieces.
        latents: B Z f h w.
        tiles: Tiles of the height and of the width.
        stride: Size of a latent pixel: frames, height, width.
    """
    if all(len(axis_tiles) == 1 for axis_tiles in tiles):
        yield from decode(latents)
        return
    frames_per_latent, pixels_per_latent, _ = stride
    batch, _, latent_frames, height, width = latents.shape
    # the first latent frame is a single frame of the clip
    frame_counts = [1] + [frames_per_latent] * (latent_frames - 1)
    pixels = torch.zeros(batch, 3, sum(frame_counts), height * pixels_per_latent, width * pixels_per_latent)
    add_in_tiles(decode, latents, tiles, pixels_per_latent=(1, pixels_per_latent), out=pixels)
    yield from pixels.split(frame_counts, dim=2)


def posterior_generator(owner: int | str) -> torch.Generator:
    """Return the random generator for a clip's or image's posterior sample.

    `owner` is the name of the cached item, so that its cache does not depend on the run's other items. For
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
    # exp(log(variance) / 2), in place because the latents of a long clip are large
    deviation = log_variance.mul_(0.5).exp_()
    for index, generator in enumerate(generators):
        noise = torch.randn(mean.shape[1:], generator=generator, device=generator.device)
        mean[index] += deviation[index].mul_(noise.to(mean.device))
    return mean.contiguous()
