"""Compute large things in parts, so that memory is bounded."""

from collections.abc import Callable

import torch
from torch import Tensor

CPU_BYTES = 1 << 24  # about what a part takes: what the caches hold is twice as fast as 256 MiB
DEVICE_BYTES = 1 << 27  # large enough for a GPU to have all its cores at work


def rows_of_part(bytes_each: int, device: torch.device, part_bytes: int | None = None) -> int:
    """Return how many rows are computed at once.

    bytes_each: what one row takes meanwhile. part_bytes: what all may take; None: what is best on the device.
    """
    if part_bytes is None:
        part_bytes = CPU_BYTES if device.type == "cpu" else DEVICE_BYTES
    return max(1, part_bytes // bytes_each)


def in_parts(
    run: Callable[[Tensor], Tensor], x: Tensor, bytes_each: int, part_bytes: int | None = None
) -> Tensor:
    """Return run(x), computed for parts of the first axis, of which `run` takes each row for itself.

    bytes_each, part_bytes: as for `rows_of_part`. The parts depend on the sizes and the kind of device alone.
    """
    rows = rows_of_part(bytes_each, x.device, part_bytes)
    return in_ranges(lambda start, end: run(x[start:end]), len(x), rows)


def in_ranges(run: Callable[[int, int], Tensor], count: int, rows: int) -> Tensor:
    """Return what `run` gives for the rows from 0 to `count`, so many at once, at least one in all."""
    found = run(0, min(rows, count))
    if rows >= count:
        return found
    # written part by part: to put all together at the end would take twice the memory
    whole = found.new_empty(count, *found.shape[1:])
    whole[:rows] = found
    for start in range(rows, count, rows):
        end = min(start + rows, count)
        whole[start:end] = run(start, end)
    return whole
