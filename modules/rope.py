"""Rotary position embeddings over several axes: neighbouring channels are pairs, each turned by position * frequency.

Source: Su et al. 2021, arXiv 2104.09864; split over the axes of a video as the released video models do.
"""
# Letters: B batch, L tokens, N heads, D head width

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

THETA = 10000.0  # base of the frequencies, as trained


def axis_angles(length: int, width: int, theta: float = THETA, dtype: torch.dtype = torch.float64) -> Tensor:
    """Angles of positions 0, 1, ... of one axis: length x width/2. width: channels that belong to the axis, even."""
    frequencies = theta ** -(torch.arange(0, width, 2, dtype=dtype) / width)
    return torch.outer(torch.arange(length, dtype=dtype), frequencies)


def grid_angles(sizes: Sequence[int], widths: Sequence[int], theta: float = THETA, dtype: torch.dtype = torch.float64) -> Tensor:
    """Angles of a grid of tokens in row-major order: L x D/2, the axes' pairs side by side.

    sizes: positions along each axis (frames, rows, columns). widths: channels of each axis, together D.
    """
    columns = []
    for axis, (size, width) in enumerate(zip(sizes, widths, strict=True)):
        shape = [1] * len(sizes) + [width // 2]
        shape[axis] = size
        columns.append(axis_angles(size, width, theta, dtype).view(shape).expand(*sizes, width // 2))
    return torch.cat(columns, dim=-1).reshape(math.prod(sizes), -1)


def complex_table(sizes: Sequence[int], widths: Sequence[int], theta: float = THETA) -> Tensor:
    """The turns as complex numbers, L 1 D/2 complex64."""
    # float64 angles: at position 1000 a float32 angle is already wrong in the fifth digit
    angles = grid_angles(sizes, widths, theta)
    return torch.complex(angles.cos().float(), angles.sin().float()).unsqueeze(1)


def real_table(sizes: Sequence[int], widths: Sequence[int], theta: float = THETA) -> Tensor:
    """The turns as (cosine, sine) pairs, L 1 D/2 2 float32 with float32 angles: the form that compilers fuse."""
    angles = grid_angles(sizes, widths, theta, torch.float32)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).unsqueeze(1)


TABLES = {"default": complex_table, "comfy": real_table}  # values of --rope_func


class GridTable:
    """A table kept for the last grid that was asked for: every step of a run has the same."""

    def __init__(self, make: Callable[[tuple[int, int, int]], Tensor]) -> None:
        """make: from the tokens along frames, rows and columns."""
        self._make = make
        self._last: tuple[tuple[int, int, int], Tensor] | None = None

    def of(self, grid: tuple[int, int, int], device: torch.device) -> Tensor:
        """The table of that grid on that device."""
        if self._last is None or self._last[0] != grid or self._last[1].device != device:
            with torch.inference_mode(False):  # a table made for a sample also serves the next training step
                self._last = grid, self._make(grid).to(device)
        return self._last[1]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the channel pairs of x (B L N D) by a table of `complex_table` or `real_table`; in float32, returned in x's dtype."""
    pairs = x.float().unflatten(-1, (-1, 2))  # B L N D/2 2
    if table.is_complex():
        return torch.view_as_real(torch.view_as_complex(pairs) * table).flatten(-2).to(x.dtype)
    first, second = pairs.unbind(-1)
    cosine, sine = table.unbind(-1)
    turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return turned.flatten(-2).to(x.dtype)
