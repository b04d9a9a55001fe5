"""What encoders of pixels share: overlapping pieces joined by linear ramps, and draws from the posterior.

There are two ways to cut. `compute_in_tiles` and `compute_in_spans` cut and fade as the released VAE of
HunyuanVideo does (`enable_tiling`): a tile begins every three quarters of a tile, however short that leaves
the last one. In the overlap a tile fades in over the one above it, then over the one to its left. `tiles`
cuts an axis into equal pieces, whose weights sum to 1. Sizes count units, latent frames or latent pixels,
which input and output share; each unit is a number of frames or pixels.
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
    """How an axis is cut into overlapping pieces.

    A piece has `size` units, and one begins every `stride` units. `unit_in` and `unit_out` are the pixels of
    a unit in input and output.
    """

    size: int
    unit_in: int
    unit_out: int

    @property
    def stride(self) -> int:
        """Distance between the starts of neighboring pieces; a quarter of each piece overlaps the next."""
        return int(self.size * 0.75)

    def pick(self, start: int) -> slice:
        """Return the input's slice of the piece that begins at a unit."""
        return slice(start * self.unit_in, (start + self.size) * self.unit_in)


def compute_in_tiles(compute: Compute, x: Tensor, cut: Cut, device: torch.device) -> Tensor:
    """Apply `compute` to x, ... H W, tile by tile in height and width.

    Returns ... H' W', float32, on `device`.
    """
    height = x.shape[-2] // cut.unit_in
    width = x.shape[-1] // cut.unit_in
    inside = cut.stride * cut.unit_out  # side of the part of a tile that later tiles do not overlap
    out = torch.empty(0)
    above: dict[int, Tensor] = {}  # by left edge: this tile's first rows as the tile above computed them
    for top in range(0, height, cut.stride):
        on_left = torch.empty(0)  # this tile's first columns as the tile to its left computed them
        for left in range(0, width, cut.stride):
            tile = compute_piece(compute, x[..., cut.pick(top), cut.pick(left)]).float()
            if top:
                _fade_in(tile, above[left], -2)
            if left:
                _fade_in(tile, on_left, -1)
            above[left] = tile[..., inside:, :].clone()
            on_left = tile[..., inside:].clone()
            if not top and not left:
                shape = (*tile.shape[:-2], height * cut.unit_out, width * cut.unit_out)
                out = torch.empty(shape, device=device)
            tile = tile[..., :inside, :inside]
            remaining = out[..., top * cut.unit_out :, left * cut.unit_out :]
            remaining[..., : tile.shape[-2], : tile.shape[-1]] = tile
            del tile  # free it before the next one is computed
    return out


def compute_in_spans(compute: Compute, x: Tensor, cut: Cut) -> Iterator[Tensor]:
    """Apply `compute` to x, B C F H W, span by span of frames.

    Yields B C' F' H' W' in order and without overlaps. A span begins with the last frame of the units before
    it, because a clip begins with a single frame; the result for that frame is dropped.
    """
    units = (x.shape[2] - 1) // cut.unit_in  # without the first frame
    shared = torch.empty(0)  # the end of the span before, which this span computes again
    for start in range(0, units, cut.stride):
        span = compute(x[:, :, start * cut.unit_in : (start + cut.size) * cut.unit_in + 1])
        if start:
            span = span[:, :, 1:]
            _fade_in(span, shared, 2)
        num_first = 0 if start else 1  # only the first span still has the single first frame
        end = cut.stride * cut.unit_out + num_first
        shared = span[:, :, end:].clone()
        yield span[:, :, :end]
        del span  # free it before the next one is computed


def _fade_in(piece: Tensor, before: Tensor, axis: int) -> None:
    """Blend the start of `piece` along an axis with the end of `before`, which covers the same region."""
    length = min(piece.shape[axis], before.shape[axis])
    head = piece.narrow(axis, 0, length)
    shape = [1] * piece.ndim
    shape[axis] = length
    ramp = (torch.arange(length, device=piece.device) / max(1, length)).view(shape)
    head.copy_(before.narrow(axis, before.shape[axis] - length, length).lerp(head, ramp))


OVERLAP = 4  # a tile shares 1 / OVERLAP of its length with its neighbor


@dataclass(frozen=True)
class Tile:
    """One piece of an axis; positions and overlaps in latent pixels, the unit that input and output share."""

    start: int
    size: int
    before: int  # units shared with the previous tile
    after: int  # with the next tile

    def pick(self, unit: int) -> slice:
        """Return the slice of this tile along an axis with `unit` pixels per latent pixel."""
        return slice(self.start * unit, (self.start + self.size) * unit)

    def weights(self, unit: int) -> Tensor:
        """Return the weight of this tile for each pixel: 1 inside, a linear ramp in the overlaps.

        The weights of overlapping tiles sum to 1.
        """
        rise = self.before * unit
        fall = self.after * unit
        weights = torch.ones(self.size * unit)
        weights[:rise] = _make_ramp(rise)
        weights[self.size * unit - fall :] = _make_ramp(fall).flip(0)
        return weights


def _make_ramp(length: int) -> Tensor:
    return (torch.arange(length) + 0.5) / length


def tiles(size: int, largest: int) -> tuple[Tile, ...]:
    """Cover `size` with equal tiles of at most `largest`; neighbors share about a quarter of `largest`.

    They share at least one latent pixel if a tile has two or more.
    """
    if size <= largest:
        return (Tile(0, size, 0, 0),)
    overlap = max(largest // OVERLAP, min(largest - 1, 1))
    count = ceil((size - overlap) / (largest - overlap))
    edge = ceil((size + (count - 1) * overlap) / count)
    starts = [(size - edge) * index // (count - 1) for index in range(count)]
    between = [first + edge - second for first, second in pairwise(starts)]
    shared = [0, *between, 0]
    return tuple(Tile(start, edge, shared[index], shared[index + 1]) for index, start in enumerate(starts))


def add_in_tiles(
    compute: Callable[[Tensor], Iterable[Tensor]],
    x: Tensor,
    cuts: tuple[Sequence[Tile], Sequence[Tile]],
    units: tuple[int, int],
    out: Tensor,
) -> None:
    """Add the weighted results for all tiles of x, B C F H W, to `out`, B C' F' H' W', which starts as zeros.

    `compute` returns the frames of a tile in order, in one or several pieces. `cuts` are the tilings of
    height and width. `units` are the sizes of a latent pixel in pixels of x and of `out`.
    """
    unit_in, unit_out = units
    rows, columns = cuts
    for row in rows:
        for column in columns:
            tile = x[..., row.pick(unit_in), column.pick(unit_in)]
            region = out[..., row.pick(unit_out), column.pick(unit_out)]
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

    With several tiles, pixels are collected in host memory and yielded after the last tile. `latents` is
    B Z f h w. `cuts` are the tilings of height and width. `stride` is the size of a latent pixel: frames,
    height, width.
    """
    if all(len(cut) == 1 for cut in cuts):
        yield from decode(latents)
        return
    step, side, _ = stride
    batch, _, frames, height, width = latents.shape
    pixels = torch.zeros(batch, 3, (frames - 1) * step + 1, height * side, width * side)
    add_in_tiles(decode, latents, cuts, units=(1, side), out=pixels)
    yield from pixels.split([1] + [step] * (frames - 1), dim=2)


def posterior_generator(owner: int | str) -> torch.Generator:
    """Return the generator for the posterior sample of a clip or an image.

    Args:
        owner: The name of the cached item, or the seed of the generation. So an item's cache does not depend
            on the other items of a run, and a generation depends only on its seed.
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
    # in place: even the latents of a long clip are large
    deviation = log_variance.mul_(0.5).exp_()
    for item, generator in enumerate(generators):
        noise = torch.randn(mean.shape[1:], generator=generator, device=generator.device)
        mean[item] += deviation[item].mul_(noise.to(mean.device))
    return mean.contiguous()
