"""Rotary position embeddings over several axes: channel pairs are rotated by position * frequency.

Source: Su et al. 2021, arXiv 2104.09864; split over the axes of a video as in the released video models.
"""
# Letters: B batch, L tokens, N heads, D head width

from collections.abc import Hashable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from modules.devices import send_ahead

Layout = TypeVar("Layout", bound=Hashable)
Asked = TypeVar("Asked", bound=Hashable, contravariant=True)
CPU = torch.device("cpu")
THETA = 10000.0  # base of the frequencies, as trained


def axis_angles(length: int, width: int, theta: float = THETA, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the angles of positions 0, 1, ... on one axis: length x width/2.

    width: channels that belong to the axis, even.
    """
    return angles_at(torch.arange(length, dtype=dtype), width, theta)


def angles_at(positions: Tensor, width: int, theta: float = THETA) -> Tensor:
    """Return the angles of any positions on an axis: n -> n x width/2, in their dtype."""
    frequencies = theta ** -(torch.arange(0, width, 2, dtype=positions.dtype) / width)
    return torch.outer(positions, frequencies)


def on_grid(axes: Sequence[Tensor]) -> Tensor:
    """Spread per-axis values over the tokens of a grid in row-major order, and concatenate the axes' pairs.

    axes: each n W/2 ..., with n positions along the axis and W of its channels. Returns L D/2 ...
    """
    sizes, columns = [len(one) for one in axes], []
    for axis, one in enumerate(axes):
        shape = [1] * len(axes) + list(one.shape[1:])
        shape[axis] = sizes[axis]
        columns.append(one.view(shape).expand(*sizes, *one.shape[1:]).flatten(0, len(axes) - 1))
    return torch.cat(columns, dim=1)  # not a view of the grid: compiled blocks would depend on its sizes


def exact_table(
    sizes: Sequence[int], widths: Sequence[int], theta: float = THETA, device: torch.device = CPU
) -> Tensor:
    """Return the (cosine, sine) pairs of a grid's tokens in row-major order: L 1 D/2 2 float32 on `device`.

    Angles are float64. sizes: positions along each axis (frames, rows, columns). widths: channels of each
    axis, D in total.
    """
    # float64: at position 1000 a float32 angle is wrong in the fifth digit
    return _table(sizes, widths, theta, torch.float64, device)


def float32_table(
    sizes: Sequence[int], widths: Sequence[int], theta: float = THETA, device: torch.device = CPU
) -> Tensor:
    """Return the table that `exact_table` returns, from float32 angles."""
    return _table(sizes, widths, theta, torch.float32, device)


def _table(
    sizes: Sequence[int], widths: Sequence[int], theta: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    # only the axes are computed on the host and sent: the table of a long video takes 60 MB, and batches of
    # several sizes need a new one every step
    axes = [
        turns(axis_angles(size, width, theta, dtype)).float()
        for size, width in zip(sizes, widths, strict=True)
    ]
    return on_grid([send_ahead(one, device) for one in axes]).unsqueeze(1)


def turns(angles: Tensor) -> Tensor:
    """Return cosine and sine of each angle in a new last dimension."""
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


TABLES = {"default": exact_table, "comfy": float32_table}  # values of --rope_func


class TableMaker(Protocol[Asked]):
    """Make a table on a device from the tokens' layout, such as the numbers of frames, rows and columns."""

    def __call__(self, layout: Asked, /, *, device: torch.device) -> Tensor: ...


class GridTable(Generic[Layout]):
    """Cache of the last grid's table: all steps of a generation use the same one."""

    def __init__(self, make: TableMaker[Layout]) -> None:
        self._make = make
        self._last: tuple[Layout, Tensor] | None = None

    def of(self, grid: Layout, device: torch.device) -> Tensor:
        """Return the table of a grid on a device."""
        if self._last is None or self._last[0] != grid or self._last[1].device != device:
            with torch.inference_mode(False):  # a table made for a sample also serves the next training step
                self._last = grid, self._make(grid, device=device)
        return self._last[1]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the channel pairs of x (B L N D) by a table of `TABLES`; in float32, returned in x's dtype.

    Uncompiled code multiplies complex numbers, a single pass over x; compiled code spells out the products,
    because compilers fuse that form. The results differ only by rounding: 1e-6 of the largest number.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # B L N D/2 2
    if not torch.compiler.is_compiling():
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    else:
        first, second = pairs.unbind(-1)
        cosine, sine = table.unbind(-1)
        turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return turned.flatten(-2).to(x.dtype)
