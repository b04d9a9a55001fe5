"""Bucket geometry: the sizes of an area, the bucket of an image, and how to resize and crop it.

Sizes are (width, height) in pixels. Numbers only: no pixels are read here.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """Fit of an image to a bucket: resize to `resized`, then crop the bucket at `crop`."""

    resized: Size
    crop: Size  # left, top
    bucket: Size
    # "none" (already that size), "lanczos" (enlarging), "area" (shrinking), or a requested filter
    interpolation: str
    halvings: int = 0  # how often the image is halved before, by averaging 2 x 2 pixels


def bucket_sizes(width: int, height: int, step: int) -> tuple[Size, ...]:
    """Return all sizes of about width x height pixels whose sides are multiples of `step`, ascending.

    The short sides run from half the square root of the area to the first multiple of `step` above it. Each
    size is included in both orientations.

    Raises:
        ValueError: If the area is too small for a single bucket.
    """
    area = width * height
    side = math.isqrt(area)
    sizes: set[Size] = set()
    for short in range(max(side // 2 // step * step, step), side + step, step):
        long = area // short // step * step
        if long:
            sizes |= {(short, long), (long, short)}
    if not sizes:
        raise ValueError(f"{width}x{height} is smaller than one {step}x{step} bucket")
    return tuple(sorted(sizes))


def select_bucket(size: Size, sizes: tuple[Size, ...], area: int, step: int, no_upscale: bool) -> Size:
    """Return the bucket with the nearest aspect ratio to `size`; the first one on a tie.

    With `no_upscale`, an image with at most `area` pixels keeps its size, rounded down to multiples of
    `step`.

    Raises:
        ValueError: If the shorter side of the image is below `step`.
    """
    width, height = size
    if no_upscale and width * height <= area:
        if min(size) < step:
            raise ValueError(
                f"{width}x{height} has a side under {step} pixels, and bucket_no_upscale forbids enlarging it"
            )
        return width // step * step, height // step * step
    aspect = width / height
    return min(sizes, key=lambda bucket: abs(bucket[0] / bucket[1] - aspect))


def fit_cover(size: Size, bucket: Size) -> Fit:
    """Return a resize until `size` just covers `bucket`, followed by a center crop."""
    if size == bucket:
        return Fit(size, (0, 0), bucket, "none")
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    resized = (int(size[0] * scale + 0.5), int(size[1] * scale + 0.5))
    crop = ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)
    return Fit(resized, crop, bucket, "lanczos" if scale > 1 else "area")


def fit_within(size: Size, area: int | None, step: int) -> Fit:
    """Return a resize to at most `area` pixels that keeps the aspect ratio, followed by a center crop.

    With `area` None, only the crop is made. Its sides are multiples of `step`.
    """
    width, height = size
    interpolation = "none"
    if area is not None and width * height > area:
        scale = math.sqrt(area / (width * height))
        width = max(int(width * scale), step)
        height = max(int(height * scale), step)
        interpolation = "lanczos"
    crop = (width % step // 2, height % step // 2)
    bucket = (width // step * step, height // step * step)
    return Fit((width, height), crop, bucket, interpolation)


def fit_to_area(size: Size, side: int, step: int) -> Fit:
    """Return a resize to about `side` x `side` pixels that keeps the aspect ratio, followed by a center crop.

    Large images are halved first, and then resized by bicubic interpolation. The sides of the crop are
    multiples of `step`, and its area is at most `side` x `side`, unless a side would be 0. Source: the
    released code of HiDream-O1-Image.
    """
    width, height = size
    halvings = 0
    while min(width, height) >= 2 * side:
        width, height = width // 2, height // 2
        halvings += 1
    scale = math.sqrt(side * side / (width * height))
    # round each side to the nearest whole number before it is cut to a multiple, or down if that is too large
    widths, heights = [
        {max(rounded(length * scale) // step, 1) * step for rounded in (round, math.floor)}
        for length in (width, height)
    ]
    by_area = sorted(itertools.product(widths, heights), key=lambda bucket: (math.prod(bucket), bucket))
    smallest, *_ = by_area
    *_, bucket = smallest, *(bucket for bucket in by_area if math.prod(bucket) <= side * side)
    ratios = width / bucket[0], height / bucket[1]
    if ratios[0] < ratios[1]:  # too high
        resized = bucket[0], round(height / ratios[0])
    else:
        resized = round(width / ratios[1]), bucket[1]
    crop = (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2
    return Fit(resized, crop, bucket, "antialiased bicubic", halvings)


# The buckets of image trainers: sizes between a shortest and a longest side, and the fit of an image.
#
# Sizes are (width, height) in pixels. Numbers only: no pixels are read here.
def image_bucket_sizes(resolution: Size, shortest: int, longest: int, step: int) -> tuple[Size, ...]:
    """Return all buckets whose area does not exceed the resolution's, in ascending order.

    These are a square and, for each width from `shortest` to `longest` in steps of `step`, the largest height
    that the area allows, in both orientations. All sides are multiples of `step`.

    Raises:
        ValueError: If there is no such bucket.
    """
    area = resolution[0] * resolution[1]
    side = math.isqrt(area) // step * step
    sizes = {(side, side)} if side else set()
    for width in range(shortest, longest + 1, step):
        height = min(longest, area // width // step * step)
        if height >= shortest:
            sizes |= {(width, height), (height, width)}
    if not sizes:
        raise ValueError(f"{resolution[0]}x{resolution[1]} is smaller than one {step}x{step} bucket")
    return tuple(sorted(sizes))


def select_image_bucket(size: Size, sizes: Sequence[Size]) -> Size:
    """Return the bucket of exactly this size, otherwise the bucket with the nearest aspect ratio."""
    if size in sizes:
        return size
    aspect = size[0] / size[1]
    return min(sizes, key=lambda bucket: abs(bucket[0] / bucket[1] - aspect))


def fit_without_enlarging(size: Size, area: int, step: int) -> Fit:
    """Return the fit of an image to a bucket of its own size, rounded down to multiples of `step`.

    An image with more than `area` pixels is first shrunk to about that area, to a size with one side that is
    a multiple of `step`. There are two such sizes; the one whose aspect ratio changes less is used.

    Raises:
        ValueError: If a side is shorter than `step`.
    """
    width, height = size
    resized = size if width * height <= area else _shrink(size, area, step)
    bucket = (resized[0] // step * step, resized[1] // step * step)
    if not min(bucket):
        raise ValueError(
            f"{width}x{height} has a side under {step} pixels, and bucket_no_upscale forbids enlarging it"
        )
    crop = ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)
    return Fit(resized, crop, bucket, "none" if resized == size else "area")


def size_within(size: Size, longest: int, step: int) -> Size:
    """Return a size of this aspect ratio in multiples of `step`, shrunk to a long side of at most `longest`.

    `longest` is a multiple of `step`. A side may grow by less than half a step, or to a whole one.
    """
    scale = min(1.0, longest / max(size))
    width, height = (max(step, round(side * scale / step) * step) for side in size)
    return width, height


def fit_like(fit: Fit, size: Size, like: Size) -> Fit:
    """Return the fit of an image, such as a mask, to a main image of size `like` whose fit is `fit`.

    If the aspect ratios agree to within 2 %, the image is resized and cropped exactly like the main image;
    otherwise it covers the same bucket.
    """
    if size == like:
        return fit
    if abs(size[0] * like[1] - size[1] * like[0]) > max(size[0] * like[1], size[1] * like[0]) // 50:
        return fit_cover(size, fit.bucket)
    return Fit(fit.resized, fit.crop, fit.bucket, select_interpolation(size, fit.resized))


def select_interpolation(size: Size, resized: Size) -> str:
    """Return the resize filter: "area" if both sides shrink, "none" for equal sizes, otherwise "lanczos"."""
    if size == resized:
        return "none"
    return "area" if resized[0] < size[0] and resized[1] < size[1] else "lanczos"


def inner_box(size: Size, bucket: Size) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom, in bucket pixels, of an image scaled to fit inside the bucket.

    This is `crop_ltrb` in the npz caches of image trainers; left and top are rounded down.
    """
    is_wider = size[0] * bucket[1] > size[1] * bucket[0]  # so it fills the bucket's width
    width = bucket[0] if is_wider else bucket[1] * size[0] / size[1]
    height = bucket[0] * size[1] / size[0] if is_wider else bucket[1]
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height


def _shrink(size: Size, area: int, step: int) -> Size:
    """Return a size of about the given area and aspect ratio in which one side is a multiple of `step`."""
    # The side is chosen so that the aspect ratio changes less when width and height are cut to multiples of
    # `step`; on a tie, the height is chosen.
    aspect = size[0] / size[1]
    width = math.sqrt(area * aspect)
    by_width = _round_down(width, step)
    by_height = _round_down(area / width, step)
    loss_by_width = abs(_ratio(by_width, _round_down(by_width / aspect, step)) - aspect)
    loss_by_height = abs(_ratio(_round_down(by_height * aspect, step), by_height) - aspect)
    if loss_by_width < loss_by_height:
        return by_width, int(by_width / aspect + 0.5)
    return int(by_height * aspect + 0.5), by_height


def _round_down(side: float, step: int) -> int:
    rounded = int(side + 0.5)
    return rounded - rounded % step


def _ratio(width: int, height: int) -> float:
    return width / height if height else math.inf
