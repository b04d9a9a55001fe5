"""Small layers that the networks of this room share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm


@dataclass(frozen=True)
class EncodedPicture:
    """Features of one picture: computed once, used by both pairs that the picture belongs to.

    All maps are float32. H and W are the sides of the picture.
    """

    quarter: Tensor  # 1 C H/4 W/4, features that the synthesis warps
    eighth: Tensor  # 1 C H/8 W/8, the same, coarser and deeper
    matching: Tensor  # 1 C H/8 W/8, features that are compared between pictures
    own: Any  # what only the estimator that made it knows


class FlowEstimator(Protocol):
    """Estimate the motion between two pictures, in float32."""

    def encode(self, image: Tensor) -> EncodedPicture:
        """Return the features of a single picture. image: 1 3 H W, 0..255, float32, sides multiples of 32."""

    def flow(self, first: EncodedPicture, second: EncodedPicture) -> Tensor:
        """Return 1 2 H W, float32: how far in x and y each pixel of the first picture moves to the second."""


CPU_BYTES = 1 << 24  # about what a part takes: what the caches hold is twice as fast as 256 MiB
DEVICE_BYTES = 1 << 27  # large enough for a GPU to have all its cores at work


def rows_of_part(bytes_each: int, device: torch.device, part_bytes: int | None = None) -> int:
    """Return how many rows are computed at once.

    bytes_each: memory of one row meanwhile. part_bytes: limit for all; None: the best for the device.
    """
    if part_bytes is None:
        part_bytes = CPU_BYTES if device.type == "cpu" else DEVICE_BYTES
    return max(1, part_bytes // bytes_each)


def in_parts(
    run: Callable[[Tensor], Tensor], x: Tensor, bytes_each: int, part_bytes: int | None = None
) -> Tensor:
    """Return run(x), computed in parts of the first axis; `run` must treat each row by itself.

    bytes_each, part_bytes: as for `rows_of_part`. The parts depend on the sizes and the kind of device alone.
    """
    rows = rows_of_part(bytes_each, x.device, part_bytes)
    return in_ranges(lambda start, end: run(x[start:end]), len(x), rows)


def in_ranges(run: Callable[[int, int], Tensor], count: int, rows: int) -> Tensor:
    """Return the results of `run` for the rows from 0 to `count`, so many at once, at least one in all."""
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


class StoredNorm(nn.Module):
    """Batch normalisation with the statistics of the file, as it is after training."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps height and width, divided by the stride."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2)
