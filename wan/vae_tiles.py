"""Cutting a picture into overlapping tiles and joining their results, for encoders that cannot take it
whole.
"""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

OVERLAP = 4  # a quarter of a tile is shared with its neighbour


@dataclass(frozen=True)
class Tile:
    """One piece of an axis, in units that input and output share (latent pixels): where it lies and how far
    it overlaps.
    """

    start: int
    size: int
    before: int  # units shared with the tile before
    after: int

    def pick(self, unit: int) -> slice:
        """This piece of an axis where a unit is so many pixels."""
        return slice(self.start * unit, (self.start + self.size) * unit)

    def weights(self, unit: int) -> Tensor:
        """How much of each pixel this tile gives: 1 inside, a linear ramp where tiles overlap.

        They sum to 1.
        """
        rise, fall = self.before * unit, self.after * unit
        weights = torch.ones(self.size * unit)
        weights[:rise] = _ramp(rise)
        weights[self.size * unit - fall :] = _ramp(fall).flip(0)
        return weights


def _ramp(length: int) -> Tensor:
    return (torch.arange(length) + 0.5) / length


def tiles(size: int, largest: int) -> tuple[Tile, ...]:
    """Equal tiles of at most `largest` that cover `size` with about a quarter of `largest` shared between
    neighbours.
    """
    if size <= largest:
        return (Tile(0, size, 0, 0),)
    overlap = largest // OVERLAP
    count = ceil((size - overlap) / (largest - overlap))
    edge = ceil((size + (count - 1) * overlap) / count)
    starts = [(size - edge) * index // (count - 1) for index in range(count)]
    shared = [0] + [first + edge - second for first, second in zip(starts, starts[1:], strict=False)] + [0]
    return tuple(Tile(start, edge, shared[index], shared[index + 1]) for index, start in enumerate(starts))


def add_tile(total: Tensor, piece: Tensor, row: Tile, column: Tile, unit: int) -> None:
    """Add a tile's result (...

    H W) to the whole at its place, weighted. Over all tiles the weights of a pixel sum to 1.
    """
    weights = row.weights(unit)[:, None] * column.weights(unit)
    total[..., row.pick(unit), column.pick(unit)] += piece.to(total.device, total.dtype) * weights.to(
        total.device
    )
