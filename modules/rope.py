"""Rotary position embeddings over several axes: neighbouring channels are pairs, each turned by position * frequency.

Source: Su et al. 2021, arXiv 2104.09864; split over the axes of a video as the released video models do.
"""
# Letters: B batch, L tokens, N heads, D head width

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from modules.devices import sent_ahead

Layout = TypeVar("Layout", bound=Hashable)
THETA = 10000.0  # base of the frequencies, as trained


def axis_angles(length: int, width: int, theta: float = THETA, dtype: torch.dtype = torch.float64) -> Tensor:
    """Angles of positions 0, 1, ... of one axis: length x width/2. width: channels that belong to the axis, even."""
    return angles_at(torch.arange(length, dtype=dtype), width, theta)


def angles_at(positions: Tensor, width: int, theta: float = THETA) -> Tensor:
    """The same of any positions on the axis: n -> n x width/2, in their dtype."""
    frequencies = theta ** -(torch.arange(0, width, 2, dtype=positions.dtype) / width)
    return torch.outer(positions, frequencies)


def grid_angles(sizes: Sequence[int], widths: Sequence[int], theta: float = THETA, dtype: torch.dtype = torch.float64) -> Tensor:
    """Angles of a grid of tokens in row-major order: L x D/2, the axes' pairs side by side.

    sizes: positions along each axis (frames, rows, columns). widths: channels of each axis, together D.
    """
    return on_grid([axis_angles(size, width, theta, dtype) for size, width in zip(sizes, widths, strict=True)])


def on_grid(axes: Sequence[Tensor]) -> Tensor:
    """What belongs to the positions of each axis, given to the tokens of a grid in row-major order, the axes' pairs side by side.

    axes: each n W/2 ..., n the positions along it, W its channels. Returns L D/2 ...
    """
    sizes, columns = [len(one) for one in axes], []
    for axis, one in enumerate(axes):
        shape = [1] * len(axes) + list(one.shape[1:])
        shape[axis] = sizes[axis]
        columns.append(one.view(shape).expand(*sizes, *one.shape[1:]))
    return torch.cat(columns, dim=len(axes)).flatten(0, len(axes) - 1)


def exact_table(sizes: Sequence[int], widths: Sequence[int], theta: float = THETA) -> Tensor:
    """The turns as (cosine, sine) pairs, L 1 D/2 2 float32, of float64 angles."""
    # at position 1000 a float32 angle is already wrong in the fifth digit
    return _turns(grid_angles(sizes, widths, theta))


def float32_table(sizes: Sequence[int], widths: Sequence[int], theta: float = THETA) -> Tensor:
    """The same of float32 angles."""
    return _turns(grid_angles(sizes, widths, theta, torch.float32))


def _turns(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos().float(), angles.sin().float()], dim=-1).unsqueeze(1)


TABLES = {"default": exact_table, "comfy": float32_table}  # values of --rope_func


class GridTable(Generic[Layout]):
    """A table kept for the last grid that was asked for: every step of a run has the same."""

    def __init__(self, make: Callable[[Layout], Tensor]) -> None:
        """make: from what says where the tokens are, such as their numbers along frames, rows and columns."""
        self._make = make
        self._last: tuple[Layout, Tensor] | None = None

    def of(self, grid: Layout, device: torch.device) -> Tensor:
        """The table of that grid on that device."""
        if self._last is None or self._last[0] != grid or self._last[1].device != device:
            with torch.inference_mode(False):  # a table made for a sample also serves the next training step
                self._last = grid, sent_ahead(self._make(grid), device)
        return self._last[1]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the channel pairs of x (B L N D) by a table of `TABLES`; in float32, returned in x's dtype.

    By complex numbers, which is one pass over x where every operation is; written out where the code is compiled, because
    compilers fuse that form. The two are equal but for the rounding of the products: 1e-6 of the largest number.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # B L N D/2 2
    if not torch.compiler.is_compiling():
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    else:
        first, second = pairs.unbind(-1)
        cosine, sine = table.unbind(-1)
        turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return turned.flatten(-2).to(x.dtype)
