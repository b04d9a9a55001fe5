"""Bucket geometry: the sizes of an area, the bucket of a picture, and how to resize and crop it.

Sizes are (width, height) in pixels. Numbers only: no pixels are read here.
"""

import math
from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """How to fit a picture to a bucket: resize to `resized`, then crop the bucket at `crop`."""

    resized: Size
    crop: Size  # left, top
    bucket: Size
    # "none" (already that size), "lanczos" (enlarging), "area" (shrinking), or what is asked for
    interpolation: str


def bucket_sizes(width: int, height: int, step: int) -> tuple[Size, ...]:
    """Return all sizes of about width x height pixels whose sides are multiples of `step`, ascending.

    The short sides run from half the square root of the area to just above it; each (w, h) comes with its
    (h, w). Raises ValueError if the area is too small for a single bucket.
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
    """Return the bucket with the aspect ratio nearest to that of `size`; the first one on a tie.

    no_upscale: a picture with at most `area` pixels keeps its own size, rounded down to multiples of `step`.
    Raises ValueError if such a picture has a side shorter than `step`.
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
    """Return how to scale `size` until it just covers `bucket`, and crop the centre."""
    if size == bucket:
        return Fit(size, (0, 0), bucket, "none")
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    resized = (int(size[0] * scale + 0.5), int(size[1] * scale + 0.5))
    crop = ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)
    return Fit(resized, crop, bucket, "lanczos" if scale > 1 else "area")
