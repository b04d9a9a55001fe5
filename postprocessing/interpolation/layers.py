"""Small layers, warps and the comparison of features, shared by the networks of this folder."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, grid_sample, interpolate, pad


@dataclass(frozen=True)
class EncodedImage:
    """Features of one image, computed once and used by both pairs that the image belongs to.

    All maps are float32. H and W are the sides of the image.
    """

    quarter: Tensor  # 1 C H/4 W/4, features that the synthesis warps
    eighth: Tensor  # 1 C H/8 W/8, the same, coarser and deeper
    matching: Tensor  # 1 C H/8 W/8, features that are compared between images
    extra: Any  # data that only the estimator that made it uses


class FlowEstimator(Protocol):
    """Estimates the optical flow between two images, in float32."""

    def encode(self, image: Tensor) -> EncodedImage:
        """Compute the features of one image.

        Args:
            image: Image, 1 3 H W, 0..255, float32, with sides that are multiples of 32.
        """

    def flow(self, first: EncodedImage, second: EncodedImage) -> Tensor:
        """Return the optical flow from the first to the second image, 1 2 H W (x, y) in float32."""


CPU_BYTES = 1 << 24  # memory of a part: fits the caches, twice as fast as 256 MiB
DEVICE_BYTES = 1 << 27  # large enough to keep all cores of a GPU busy


def chunk_rows(bytes_per_row: int, device: torch.device, chunk_bytes: int | None = None) -> int:
    """Return how many rows to compute at once within the memory limit.

    Args:
        bytes_per_row: Memory to compute one row.
        device: Device of the run.
        chunk_bytes: Limit for all rows; None for the best size for the device.
    """
    if chunk_bytes is None:
        chunk_bytes = CPU_BYTES if device.type == "cpu" else DEVICE_BYTES
    return max(1, chunk_bytes // bytes_per_row)


def map_in_chunks(
    run: Callable[[Tensor], Tensor], x: Tensor, bytes_per_row: int, chunk_bytes: int | None = None
) -> Tensor:
    """Return run(x), computed in parts along the first axis; `run` must treat each row separately.

    The parts depend only on the sizes and the type of device.

    Args:
        run: Function to apply.
        x: Rows.
        bytes_per_row: Memory to compute one row.
        chunk_bytes: Memory limit of a part; None for the best size for the device.
    """
    rows = chunk_rows(bytes_per_row, x.device, chunk_bytes)
    return map_row_ranges(lambda start, end: run(x[start:end]), len(x), rows)


def map_row_ranges(run: Callable[[int, int], Tensor], count: int, rows: int) -> Tensor:
    """Call run(start, end) for successive ranges of rows, and return the concatenated results.

    The ranges cover 0 to `count` (at least 1) with at most `rows` rows each.
    """
    first_rows = run(0, min(rows, count))
    if rows >= count:
        return first_rows
    # written part by part: concatenating at the end would take twice the memory
    joined = first_rows.new_empty(count, *first_rows.shape[1:])
    joined[:rows] = first_rows
    for start in range(rows, count, rows):
        end = min(start + rows, count)
        joined[start:end] = run(start, end)
    return joined


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """Return a convolution that preserves height and width at stride 1."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2)


# Warp images along optical flow, backward (sampling) and forward (splatting), and resize. All in float32.
#
# Sources: Jaderberg et al. 2015, arXiv 1506.02025 (sampling); Niklaus and Liu 2020, arXiv 2003.05534
# (splatting).
# Letters: B batch, C channels, H W height and width


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """Sample an image where the flow of each pixel points; outside the image, its edge is repeated.

    Args:
        image: Image, B C H W.
        flow: Flow, B 2 H W, in pixels along x and y.

    Returns:
        Float32.
    """
    height, width = flow.shape[-2:]
    # float32: half precision has no exact columns above 2048
    x, y = flow.float().unbind(1)
    # grid_sample takes coordinates from -1 to 1, so pixels are divided by half the size
    x = torch.linspace(-1, 1, width, device=x.device) + x / ((width - 1) / 2)
    y = torch.linspace(-1, 1, height, device=y.device)[:, None] + y / ((height - 1) / 2)
    grid = torch.stack([x, y], dim=-1)
    return grid_sample(image.float(), grid, mode="bilinear", padding_mode="border", align_corners=True)


def splat(image: Tensor, flow: Tensor, weight: Tensor) -> Tensor:
    """Move each pixel to where the flow points to; return the weighted mean of the pixels at each position.

    Args:
        image: Image, 1 C H W.
        flow: Flow, 1 2 H W.
        weight: Weight of each pixel, 1 1 H W.

    Returns:
        1 C H W float32, 0 at positions where no pixel arrives.
    """
    weighted = torch.cat([image * weight, weight], dim=1).float()
    # H*W rows, one for each position, so that arriving pixels are added as whole rows
    total = _sum_arrivals(weighted[0].flatten(1).t().contiguous(), flow)
    colors = total[:, :-1]
    norm = total[:, -1:]
    mean = colors / torch.where(norm == 0, 1.0, norm)
    return mean.t().reshape(image.shape)


def _sum_arrivals(values: Tensor, flow: Tensor) -> Tensor:
    """Sum the rows that the optical flow moves to each position (forward warping)."""
    # A row is shared among the four pixels around its target, by bilinear weights.
    # values: Rows, H*W C.
    # flow: Flow, 1 2 H W.
    height, width = flow.shape[-2:]
    total = torch.zeros_like(values)
    x, y = _find_targets(flow)
    left = x.floor()
    top = y.floor()
    for dx, dy in product((0, 1), (0, 1)):
        target, weight = _weigh_neighbor(x, y, column=left + dx, row=top + dy, size=(height, width))
        index = target[:, None].expand_as(values)
        total.scatter_add_(0, index, values * weight[:, None])
    return total


def _weigh_neighbor(
    x: Tensor, y: Tensor, column: Tensor, row: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the index of a neighboring pixel of each target, and its bilinear weight."""
    height, width = size
    weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
    is_inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    # positions outside are clamped to a valid index; their weight is 0
    index = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
    return index, torch.where(is_inside, weight, 0.0)


def _find_targets(flow: Tensor) -> tuple[Tensor, Tensor]:
    """Return x and y, H*W each, where the flow moves each pixel: outside the image if it is not finite."""
    height, width = flow.shape[-2:]
    rows = torch.arange(height, device=flow.device, dtype=torch.float32)[:, None]
    columns = torch.arange(width, device=flow.device, dtype=torch.float32)
    x = (columns + flow[0, 0].float()).flatten()
    y = (rows + flow[0, 1].float()).flatten()
    is_finite = x.isfinite() & y.isfinite()
    return torch.where(is_finite, x, -9.0), torch.where(is_finite, y, -9.0)


def resize(image: Tensor, factor: float) -> Tensor:
    """Resize B C H W bilinearly by a factor, without antialiasing."""
    if factor == 1:
        return image
    size = [round(side * factor) for side in image.shape[-2:]]
    return interpolate(image, size=size, mode="bilinear", align_corners=False)


# Compare the features of two images around given places, at four scales.
#
# The usual implementation stores the products of all pairs of positions, whose memory grows with the fourth
# power of the side. Averaging and sampling are linear, so the same values result from averaging the second
# image's features and multiplying only those around each position. All offsets share four neighbors. Source
# of the lookup: Teed and Deng 2020, arXiv 2003.12039.
# Letters: C channels, h w height and width of the features, P places (h times w), N places of a chunk

LEVELS = 4  # each half as large as the one before
RADIUS = 4
SIDE = 2 * RADIUS + 1  # offsets in x and y
CHANNELS = LEVELS * SIDE**2
REACH = SIDE + 1  # number of grid positions that surround the offsets, in x and y
VOLUME_BYTES = 3 << 29  # maximum bytes of stored products of all pairs: enough for 720p with all scales


class Correlation:
    """Correlation of the features of two images, for lookups around any position."""

    def __init__(
        self,
        first: Tensor,
        second: Tensor,
        stores_volume: bool | None = None,
        *,
        levels: int = LEVELS,
        scale: float | None = None,
    ) -> None:
        """Prepare the correlation of all positions of two images, at several scales.

        Args:
            first: Features of the first image, 1 C h w, float32.
            second: Features of the second image, 1 C h w, float32.
            stores_volume: Whether to store the products of all pairs of positions, instead of computing them
                when they are looked up; None decides by the size.
            levels: Number of scales to compare at.
            scale: Factor of all products; None for 1 / sqrt(C).
        """
        self._size = first.shape[-2:]
        scale = first.shape[1] ** -0.5 if scale is None else scale
        # rows of the first image and columns of the second, so that a matrix product compares all positions
        self._first = rearrange(first.float(), "1 c h w -> (h w) c") * scale
        self._second = second[0].float().flatten(1)
        pyramid = [second.float()]
        for _ in range(levels - 1):
            pyramid.append(avg_pool2d(pyramid[-1], 2, stride=2))
        self._sizes = [features.shape[-2:] for features in pyramid]
        if stores_volume is None:
            # depends on the size only, so that a clip gives the same images on every device
            height, width = self._size
            stores_volume = _count_volume_bytes(height, width, levels) <= VOLUME_BYTES
        self._stores_volume = stores_volume
        make_level = self._multiply_level if stores_volume else _pad_level
        self._levels = [make_level(features) for features in pyramid]

    def _multiply_level(self, features: Tensor) -> Tensor:
        """Return the dot products of all first-image positions with all second-image positions at a level."""
        return self._first @ features[0].flatten(1)

    def lookup(self, positions: Tensor) -> Tensor:
        """Return the correlations around one position of the second image for each position of the first.

        The result is 1 81*levels h w. Channel level * 81 + i * 9 + j belongs to the position moved by i - 4
        in x and j - 4 in y at that scale; outside of the image it is 0.

        Args:
            positions: Positions in the second image's features, 1 2 h w, x and y.
        """
        centers = rearrange(positions.float(), "1 two h w -> (h w) two")
        # positions that are not finite are moved far outside, so that no offset reaches the image
        centers = centers.nan_to_num(-1e6, -1e6, -1e6).clamp(-1e6, 1e6)
        products = [self._look_around(level, centers / 2**level) for level in range(len(self._levels))]
        height, width = self._size
        return rearrange(torch.cat(products, dim=1), "(h w) c -> 1 c h w", h=height, w=width)

    def correlate_rows(self, start: int, end: int) -> Tensor:
        """Return correlations n h w: positions `start` to `end` of the first image with all of the second."""
        rows = self._levels[0][start:end] if self._stores_volume else self._first[start:end] @ self._second
        return rows.unflatten(1, self._sizes[0])

    def _look_around(self, level: int, centers: Tensor) -> Tensor:
        """Return correlations with 9 x 9 positions around `centers` (P 2, at this level's scale): P 81."""
        corner = centers.floor()
        share = centers - corner
        start = corner.long() - RADIUS
        products = (
            self._from_volume(level, start) if self._stores_volume else self._compute_products(level, start)
        )
        x, y = share[:, 0, None, None], share[:, 1, None, None]
        rows = products[:, :-1] * (1 - y) + products[:, 1:] * y  # P 9 10
        mixed = rows[:, :, :-1] * (1 - x) + rows[:, :, 1:] * x  # P 9 9: y, x
        return mixed.transpose(1, 2).flatten(1)

    def _from_volume(self, level: int, start: Tensor) -> Tensor:
        """Gather correlations P 10 10 (y, x) around positions from the stored volume."""
        height, width = self._sizes[level]
        steps = torch.arange(REACH, device=start.device)
        x = start[:, :1] + steps  # P 10
        y = start[:, 1:] + steps
        is_row = (y >= 0) & (y < height)
        is_column = (x >= 0) & (x < width)
        row = y.clamp(0, height - 1)
        column = x.clamp(0, width - 1)
        index = row[:, :, None] * width + column[:, None]  # P 10 10
        products = self._levels[level].gather(1, index.flatten(1)).view_as(index)
        return products * (is_row[:, :, None] & is_column[:, None])

    def _compute_products(self, level: int, start: Tensor) -> Tensor:
        """Compute the products of each position with a window of the second image, P 10 10 (y, x)."""
        # Used if the full cost volume would take too much memory. `start` holds x and y of the window's first
        # corner for each of the P positions.
        height, width = self._sizes[level]
        features = self._levels[level]  # with REACH zeros around the image
        stride = width + 2 * REACH  # length of a row, with its zeros
        # a window that is farther outside the image also reads only zeros
        x = start[:, 0].clamp(-REACH, width) + REACH
        y = start[:, 1].clamp(-REACH, height) + REACH
        steps = torch.arange(REACH, device=start.device)
        window = (steps[:, None] * stride + steps).flatten()
        index = (y * stride + x)[:, None] + window  # P 100
        channels = features.shape[1]
        chunk = chunk_rows(4 * channels * REACH**2, features.device)  # of gathered features
        products = []
        for indices, first_features in zip(index.split(chunk), self._first.split(chunk), strict=True):
            features_around = features.index_select(0, indices.flatten()).view(-1, REACH**2, channels)
            products.append(features_around @ first_features[:, :, None])
        return torch.cat(products).view(-1, REACH, REACH)


def _pad_level(features: Tensor) -> Tensor:
    """Return the channels of each position of a pyramid level as a row, with REACH zeros around the image."""
    padded = pad(features, (REACH,) * 4)
    return rearrange(padded, "1 c h w -> (h w) c").contiguous()


def _count_volume_bytes(height: int, width: int, levels: int) -> int:
    """Return the memory of the correlations of all pairs of positions, at all scales."""
    positions = sum((height >> level) * (width >> level) for level in range(levels))
    return 4 * height * width * positions


def grid_positions(height: int, width: int, device: torch.device) -> Tensor:
    """Return the position (x, y) of each cell of a grid, H W 2 in float32."""
    rows = torch.arange(height, device=device, dtype=torch.float32)
    columns = torch.arange(width, device=device, dtype=torch.float32)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=-1)


def pixel_coordinates(features: Tensor) -> Tensor:
    """Return the pixel coordinates (x, y) of each position of a feature map, 1 2 h w in float32."""
    height, width = features.shape[-2:]
    return grid_positions(height, width, features.device).permute(2, 0, 1)[None].contiguous()
