"""Rotary embeddings of positions over several axes, and sinusoidal embeddings of timesteps.

Rotary: channel pairs are rotated by position * frequency. Source: Su et al. 2021, arXiv 2104.09864; split
over the axes of a video as in the released video models. Sinusoids: Vaswani et al. 2017, arXiv 1706.03762,
and for timesteps Ho et al. 2020, arXiv 2006.11239; the video models put cosines first.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from modules.devices import send_ahead

# Letters: B batch, L tokens, N heads, D head width


Layout = TypeVar("Layout", bound=Hashable)
Asked = TypeVar("Asked", bound=Hashable, contravariant=True)
CPU = torch.device("cpu")
THETA = 10000.0  # base of the frequencies, as trained


@dataclass(frozen=True)
class SlowedFrequency:
    """A rotary frequency of one axis, lowered so that a long video does not repeat itself (RIFLEx)."""

    index: int  # index of the frequency, from 0, fastest first
    period: float  # positions per full rotation


class TokenGrid(NamedTuple):
    """A grid of tokens and its positions; also the key of its cached rotary table."""

    sizes: tuple[int, ...]  # frames, rows, columns
    slow: SlowedFrequency | None = None  # lowered frequency of the frame axis
    first_position: int = 0  # position of the first frame
    frame_positions: tuple[int, ...] = ()  # positions of all frames, if they are not consecutive
    # number of the source that the tokens belong to: an additional rotation of all tokens, by its position on
    # an axis as wide as the head. 0, the target, adds nothing
    source: float = 0.0


def rotation_angles(
    positions: Tensor, width: int, theta: float = THETA, slow: SlowedFrequency | None = None
) -> Tensor:
    """Return the rotation angles of positions on an axis: n -> n x width/2, in the dtype of the positions.

    `width` is the number of channels that belong to the axis, which is even. `slow` replaces one of the
    trained frequencies.

    Raises:
        ValueError: If the axis lacks that frequency.
    """
    frequencies = theta ** -(torch.arange(0, width, 2, dtype=positions.dtype) / width)
    if slow is not None:
        if not 0 <= slow.index < len(frequencies):
            raise ValueError(f"the axis has {len(frequencies)} frequencies, none of number {slow.index}")
        frequencies[slow.index] = 2 * math.pi / slow.period  # one rotation per period
    return torch.outer(positions, frequencies)


def spread_over_grid(axes: Sequence[Tensor]) -> Tensor:
    """Expand per-axis values to all tokens of a grid in row-major order, and concatenate the axes' channels.

    `axes` are each n W/2 ..., with n positions along the axis and W of its channels. Returns L D/2 ...
    """
    sizes = [len(table) for table in axes]
    columns = []
    for axis, table in enumerate(axes):
        shape = [1] * len(axes) + list(table.shape[1:])
        shape[axis] = sizes[axis]
        columns.append(table.view(shape).expand(*sizes, *table.shape[1:]).flatten(0, len(axes) - 1))
    return torch.cat(columns, dim=1)  # not a view of the grid: compiled blocks would depend on its sizes


def rotary_table(
    grid: TokenGrid,
    widths: Sequence[int],
    theta: float = THETA,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float64,
    stored: torch.dtype = torch.float32,
) -> Tensor:
    """Return the (cosine, sine) pairs of a grid's tokens in row-major order: L 1 D/2 2 on `device`.

    `widths` are the channels per axis, D in total. `dtype` is the dtype of the angles; at position 1000 a
    float32 angle is wrong in the fifth digit. `stored` is the dtype of the table.
    """
    # only the axes are computed on the host and sent: the table of a long video takes 60 MB, and batches of
    # several sizes need a new one every step
    axis_tables = []
    source_angles = rotation_angles(torch.tensor([grid.source], dtype=dtype), sum(widths), theta)
    source_parts = source_angles.split([width // 2 for width in widths], dim=1)
    for axis, (size, width) in enumerate(zip(grid.sizes, widths, strict=True)):
        is_frame_axis = axis == 0
        first = grid.first_position if is_frame_axis else 0
        positions = torch.arange(first, first + size, dtype=dtype)
        if is_frame_axis and grid.frame_positions:  # frames that are not consecutive
            positions = torch.tensor(grid.frame_positions, dtype=dtype)
        angles = rotation_angles(positions, width, theta, grid.slow if is_frame_axis else None)
        axis_tables.append(send_ahead(cos_and_sin(angles + source_parts[axis]).float(), device))
    return spread_over_grid(axis_tables).unsqueeze(1).to(stored)


def cos_and_sin(angles: Tensor) -> Tensor:
    """Return (cosine, sine) of angles along a new last axis."""
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def axis_rotations(positions: Tensor, width: int, theta: float, device: torch.device) -> Tensor:
    """Return the (cosine, sine) pairs of positions on one axis, n width/2 2 float32 on `device`.

    The angles are computed on the host in the dtype of `positions`. `width` is the axis's number of channels,
    and `theta` the base of its frequencies.
    """
    pairs = cos_and_sin(rotation_angles(positions, width, theta))
    return send_ahead(pairs.float(), device)


def consecutive_rotations(first: int, count: int, width: int, theta: float, device: torch.device) -> Tensor:
    """Return `axis_rotations` of `count` consecutive positions from `first` on, with float64 angles."""
    positions = torch.arange(first, first + count, dtype=torch.float64)
    return axis_rotations(positions, width, theta, device)


float32_table = functools.partial(rotary_table, dtype=torch.float32)
# values of --rope_func
TABLES: dict[str, Callable[..., Tensor]] = {"default": rotary_table, "comfy": float32_table}


class TableMaker(Protocol[Asked]):
    """Makes a table of rotary embeddings for one grid of tokens (frames, rows, columns), or for several."""

    def __call__(self, layout: Asked, /, *, device: torch.device) -> Tensor:
        """Return the (cosine, sine) pairs of all tokens of a layout, on `device`."""


def bind_rotary_table(
    make: Callable[..., Tensor],
    widths: Sequence[int],
    theta: float = THETA,
    dtype: torch.dtype = torch.float32,
) -> TableMaker[TokenGrid]:
    """Return a function that makes one network's tables of rotary embeddings.

    `make` is a function in `TABLES`, `widths` are the channels per axis, and `dtype` is the table's dtype.
    """
    return functools.partial(make, widths=widths, theta=theta, stored=dtype)


def joined_tables(make: TableMaker[TokenGrid]) -> TableMaker[tuple[TokenGrid, ...]]:
    """Return a function that makes one rotary table for several token grids that follow one another."""

    def make_joined(grids: tuple[TokenGrid, ...], /, *, device: torch.device) -> Tensor:
        return torch.cat([make(grid, device=device) for grid in grids])

    return make_joined


@dataclass(eq=False)
class GridTable(Generic[Layout]):
    """Caches the table of the last grid, which all steps of a generation share."""

    make: TableMaker[Layout]
    _last: tuple[Layout, Tensor] | None = None  # the last grid, and its table

    def get_table(self, grid: Layout, device: torch.device) -> Tensor:
        """Return a grid's table on a device; it is only computed if the last call was for another grid."""
        if self._last is None or self._last[0] != grid or self._last[1].device != device:
            with torch.inference_mode(False):  # also for the next training step
                self._last = grid, self.make(grid, device=device)
        return self._last[1]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the channel pairs of x, B L N D; computed in the table's dtype, returned in the dtype of x.

    Eager code multiplies complex numbers, which is a single pass over x; compiled code writes out the real
    products, which compilers can fuse. The results differ only by rounding, 1e-6 of the largest number. For
    a 16-bit table the products are written out too, because torch has no complex dtype of that size.
    """
    # type_as: if the dtype is right already, `to(dtype)` takes four times as long to notice
    pairs = x.type_as(table).unflatten(-1, (-1, 2))  # B L N D/2 2
    if not torch.compiler.is_compiling() and table.dtype.itemsize >= 4:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    else:
        first, second = pairs.unbind(-1)
        cosine, sine = table.unbind(-1)
        rotated = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return rotated.flatten(-2).type_as(x)


def select_rotations(table: Tensor, kept: Tensor, num_left_out: int) -> Tensor:
    """Return the rotations of the tokens that are kept: B K' 1 D/2 2.

    `table` contains the rotations of the first L tokens: L 1 D/2 2 or B L 1 D/2 2. `kept` contains the
    positions of the kept tokens in ascending order, B K. `num_left_out` of the first L tokens are not kept.
    """
    positions = kept[:, : table.shape[-4] - num_left_out]
    if table.ndim == 4:
        return table[positions]
    samples = torch.arange(len(table), device=table.device)
    return table[samples[:, None], positions]


LONGEST = 10000.0  # the frequencies fall from 1 to nearly 1 / LONGEST


def sinusoid(numbers: Tensor, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the sinusoidal embedding of numbers (B), cosines before sines: B width float32.

    `width` is even. `dtype` is the dtype of frequencies and angles with which the model was trained; for the
    number 6000, a float32 angle is wrong in the fourth digit.
    """
    half = width // 2
    # Apple GPUs have no float64
    device = torch.device("cpu") if numbers.device.type == "mps" else numbers.device
    numbered = torch.arange(half, dtype=dtype, device=device)
    # Each dtype uses the formula of the models trained with it, as the two round differently: in float32, the
    # results for 1000 differ by up to 6e-5. Both compute the power in float64, because in float32 its last
    # digits depend on the processor, and their error is multiplied by the number, such as 1000.
    if dtype == torch.float64:
        frequencies = LONGEST ** -(numbered / half)
    else:
        frequencies = (-math.log(LONGEST) * numbered / half).double().exp().to(dtype)
    angles = torch.outer(numbers.to(device, dtype), frequencies)
    waves = angles.new_empty(len(numbers), 2 * half)
    torch.cos(angles, out=waves[:, :half])
    torch.sin(angles, out=waves[:, half:])
    return waves.to(numbers.device, torch.float32)
