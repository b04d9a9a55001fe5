"""Rotary position embeddings over several axes: neighbouring channels are pairs, each turned by position *
frequency.

Source: Su et al. 2021, arXiv 2104.09864; split over the axes of a video as the released video models do.
"""
# Letters: B batch, L tokens, N heads, D head width

from collections.abc import Hashable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from modules.devices import sent_ahead

Layout = TypeVar("Layout", bound=Hashable)
Asked = TypeVar("Asked", bound=Hashable, contravariant=True)
CPU = torch.device("cpu")
THETA = 10000.0  # base of the frequencies, as trained


def axis_angles(length: int, width: int, theta: float = THETA, dtype: torch.dtype = torch.float64) -> Tensor:
    """Angles of positions 0, 1, ...

    of one axis: length x width/2. width: channels that belong to the axis, even.
    """
    return angles_at(torch.arange(length, dtype=dtype), width, theta)


def angles_at(positions: Tensor, width: int, theta: float = THETA) -> Tensor:
    """The same of any positions on the axis: n -> n x width/2, in their dtype."""
    frequencies = theta ** -(torch.arange(0, width, 2, dtype=positions.dtype) / width)
    return torch.outer(positions, frequencies)


def on_grid(axes: Sequence[Tensor]) -> Tensor:
    """What belongs to the positions of each axis, given to the tokens of a grid in row-major order, the axes'
    pairs side by side.

    axes: each n W/2 ..., n the positions along it, W its channels. Returns L D/2 ...
    """
    sizes, columns = [len(one) for one in axes], []
    for axis, one in enumerate(axes):
        shape = [1] * len(axes) + list(one.shape[1:])
        shape[axis] = sizes[axis]
        columns.append(one.view(shape).expand(*sizes, *one.shape[1:]).flatten(0, len(axes) - 1))
    return torch.cat(columns, dim=1)  # no view of a grid: compiled blocks would depend on its sizes


def exact_table(
    sizes: Sequence[int], widths: Sequence[int], theta: float = THETA, device: torch.device = CPU
) -> Tensor:
    """The turns of a grid of tokens in row-major order as (cosine, sine) pairs on `device`: L 1 D/2 2
    float32, of float64 angles.

    sizes: positions along each axis (frames, rows, columns). widths: channels of each axis, together D.
    """
    # at position 1000 a float32 angle is already wrong in the fifth digit
    return _table(sizes, widths, theta, torch.float64, device)


def float32_table(
    sizes: Sequence[int], widths: Sequence[int], theta: float = THETA, device: torch.device = CPU
) -> Tensor:
    """The same of float32 angles."""
    return _table(sizes, widths, theta, torch.float32, device)


def _table(
    sizes: Sequence[int], widths: Sequence[int], theta: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    # the host computes and sends the axes only: a table of a long video is 60 MB, and batches of several
    # sizes need one each step
    axes = [
        turns(axis_angles(size, width, theta, dtype)).float()
        for size, width in zip(sizes, widths, strict=True)
    ]
    return on_grid([sent_ahead(one, device) for one in axes]).unsqueeze(1)


def turns(angles: Tensor) -> Tensor:
    """Cosine and sine of each angle, side by side in a new last dimension."""
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


TABLES = {"default": exact_table, "comfy": float32_table}  # values of --rope_func


class TableMaker(Protocol[Asked]):
    """Makes a table on a device from what says where the tokens are, such as their numbers along frames, rows
    and columns.
    """

    def __call__(self, layout: Asked, /, *, device: torch.device) -> Tensor: ...


class GridTable(Generic[Layout]):
    """A table kept for the last grid that was asked for: the steps of a generation have the same."""

    def __init__(self, make: TableMaker[Layout]) -> None:
        self._make = make
        self._last: tuple[Layout, Tensor] | None = None

    def of(self, grid: Layout, device: torch.device) -> Tensor:
        """The table of that grid on that device."""
        if self._last is None or self._last[0] != grid or self._last[1].device != device:
            with torch.inference_mode(False):  # a table made for a sample also serves the next training step
                self._last = grid, self._make(grid, device=device)
        return self._last[1]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the channel pairs of x (B L N D) by a table of `TABLES`; in float32, returned in x's dtype.

    By complex numbers, which is one pass over x where every operation is; written out where the code is
    compiled, because compilers fuse that form. The two are equal but for the rounding of the products: 1e-6
    of the largest number.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # B L N D/2 2
    if not torch.compiler.is_compiling():
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    else:
        first, second = pairs.unbind(-1)
        cosine, sine = table.unbind(-1)
        turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return turned.flatten(-2).to(x.dtype)
