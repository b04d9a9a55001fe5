"""Move pictures along optical flow: backward by sampling, forward by adding up; and resize. All in float32.

Sources: Jaderberg et al. 2015, arXiv 1506.02025 (sampling); Niklaus and Liu 2020, arXiv 2003.05534
(splatting).
"""

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

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
