"""Compute large things in parts, so that memory is bounded."""

from collections.abc import Callable

import torch
from torch import Tensor

PART_BYTES = 1 << 28  # what is computed at once takes about this at most


def rows_of_part(bytes_each: int, part_bytes: int = PART_BYTES) -> int:
    """Return how many rows are computed at once. bytes_each: what one row takes meanwhile."""
    return max(1, part_bytes // bytes_each)


def in_parts(
    run: Callable[[Tensor], Tensor], x: Tensor, bytes_each: int, part_bytes: int = PART_BYTES
) -> Tensor:
    """Return run(x), computed for parts of the first axis, of which `run` takes each row for itself.

    bytes_each: what one row takes while it is computed. The parts depend on the sizes alone, so that a
    picture gives the same on every device.
    """
    rows = rows_of_part(bytes_each, part_bytes)
    if len(x) <= rows:
        return run(x)
    return torch.cat([run(part) for part in x.split(rows)])
