"""Cut a picture into overlapping tiles and join their results, for encoders that cannot take it whole."""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

OVERLAP = 4  # a tile shares 1 / OVERLAP of its length with its neighbour


@dataclass(frozen=True)
class Tile:
    """One piece of an axis; places and overlaps in latent pixels, the unit that input and output share."""

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
        rise, fall = self.before * unit, self.after * unit
        weights = torch.ones(self.size * unit)
        weights[:rise] = _ramp(rise)
        weights[self.size * unit - fall :] = _ramp(fall).flip(0)
        return weights


def _ramp(length: int) -> Tensor:
    return (torch.arange(length) + 0.5) / length


def tiles(size: int, largest: int) -> tuple[Tile, ...]:
    """Cover `size` with equal tiles of at most `largest`; neighbours share about a quarter of `largest`.

    They share at least one latent pixel if a tile has two or more.
    """
    if size <= largest:
        return (Tile(0, size, 0, 0),)
    overlap = max(largest // OVERLAP, min(largest - 1, 1))
    count = ceil((size - overlap) / (largest - overlap))
    edge = ceil((size + (count - 1) * overlap) / count)
    starts = [(size - edge) * index // (count - 1) for index in range(count)]
    shared = [0] + [first + edge - second for first, second in zip(starts, starts[1:], strict=False)] + [0]
    return tuple(Tile(start, edge, shared[index], shared[index + 1]) for index, start in enumerate(starts))


def add_tile(total: Tensor, piece: Tensor, row: Tile, column: Tile, unit: int) -> None:
    """Add a tile's weighted result, ... H W, to the whole at its place.

    Over all tiles the weights of a pixel sum to 1.
    """
    weights = row.weights(unit)[:, None] * column.weights(unit)
    total[..., row.pick(unit), column.pick(unit)] += piece.to(total.device, total.dtype) * weights.to(
        total.device
    )
