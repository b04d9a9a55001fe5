"""Bucket geometry: which sizes an area allows, which of them fits a picture, and how the picture is resized
and cropped to it.

Sizes are (width, height) in pixels. Plain numbers only: nothing here touches a pixel.
"""

import math
from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """How a picture becomes a bucket: resize to `resized`, then cut the bucket out at `crop`."""

    resized: Size
    crop: Size  # left, top
    bucket: Size
    interpolation: str  # "none" (already that size), "lanczos" (enlarging) or "area"


def bucket_sizes(width: int, height: int, step: int) -> tuple[Size, ...]:
    """All sizes with about the area width x height whose sides are multiples of `step`, ascending.

    Widths run from half the square root of the area to just above it; each (w, h) comes with its (h, w).
    Raises ValueError where the area is too small for a single bucket.
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


def choose_bucket(size: Size, sizes: tuple[Size, ...], area: int, step: int, no_upscale: bool) -> Size:
    """The bucket for a picture of `size`: the one with the nearest aspect ratio, the first on a tie.

    no_upscale: a picture with at most `area` pixels keeps its own size, rounded down to multiples of `step`.
    Raises ValueError where such a picture has a side shorter than `step`.
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
    """Scale `size` until it just covers `bucket`, then crop the centre."""
    if size == bucket:
        return Fit(size, (0, 0), bucket, "none")
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    resized = (int(size[0] * scale + 0.5), int(size[1] * scale + 0.5))
    crop = ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)
    return Fit(resized, crop, bucket, "lanczos" if scale > 1 else "area")
