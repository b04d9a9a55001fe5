"""Small layers and warps that the networks of this room share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, grid_sample, interpolate


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


# Move pictures along optical flow: backward by sampling, forward by adding up; and resize. All in float32.
#
# Sources: Jaderberg et al. 2015, arXiv 1506.02025 (sampling); Niklaus and Liu 2020, arXiv 2003.05534
# (splatting).
# Letters: B batch, C channels, H W height and width


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """Return, for each pixel, the image at the place that the flow points to; beyond the edge, the edge.

    image: B C H W. flow: B 2 H W, pixels in x and y. Returns float32.
    """
    height, width = flow.shape[-2:]
    # float32: half precision has no exact columns above 2048
    x, y = flow.float().unbind(1)
    x = torch.linspace(-1, 1, width, device=x.device) + x / ((width - 1) / 2)
    y = torch.linspace(-1, 1, height, device=y.device)[:, None] + y / ((height - 1) / 2)
    grid = torch.stack([x, y], dim=-1)
    return grid_sample(image.float(), grid, mode="bilinear", padding_mode="border", align_corners=True)


def splat(image: Tensor, flow: Tensor, weight: Tensor) -> Tensor:
    """Send each pixel to the place that the flow points to, and return the weighted mean of arriving pixels.

    image: 1 C H W. flow: 1 2 H W. weight: 1 1 H W. Returns 1 C H W float32, 0 at places nothing arrives at.
    """
    _, channels, height, width = image.shape
    # H*W rows: one place each, so that what arrives is added in whole rows
    values = torch.cat([image * weight, weight], dim=1).float()[0].flatten(1).t().contiguous()
    total = torch.zeros_like(values)
    rows = torch.arange(height, device=flow.device, dtype=torch.float32)[:, None]
    columns = torch.arange(width, device=flow.device, dtype=torch.float32)
    x, y = (columns + flow[0, 0].float()).flatten(), (rows + flow[0, 1].float()).flatten()
    is_finite = x.isfinite() & y.isfinite()
    x, y = torch.where(is_finite, x, -9.0), torch.where(is_finite, y, -9.0)  # outside
    left, top = x.floor(), y.floor()
    for dx in (0, 1):
        for dy in (0, 1):
            column, row = left + dx, top + dy
            share = (1 - (x - column).abs()) * (1 - (y - row).abs())
            is_inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            share = torch.where(is_inside, share, 0.0)
            place = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            total.scatter_add_(0, place[:, None].expand_as(values), values * share[:, None])
    norm = total[:, -1:]
    mean = total[:, :-1] / torch.where(norm == 0, 1.0, norm)
    return mean.t().reshape(1, channels, height, width)


def resize(image: Tensor, factor: float) -> Tensor:
    """Return B C H W resized bilinearly by a factor, without smoothing before."""
    if factor == 1:
        return image
    size = [round(side * factor) for side in image.shape[-2:]]
    return interpolate(image, size=size, mode="bilinear", align_corners=False)
