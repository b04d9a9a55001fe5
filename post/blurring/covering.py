"""Make what is in boxes unrecognisable, and leave all other pixels as they are."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from post.blurring.options import BlurOptions
from post.blurring.tracks import Box
from post.contract import Pixels

LEAST_OF_BOX = 0.5  # size of the blur as part of the longer side of what it covers
LEAST_SIGMA = 0.25  # as part of the blur's size: below that a Gaussian uses only the middle of it
COARSE = 48  # pixels: larger blurs are made on a copy in which they have this size


@dataclass(frozen=True)
class _Area:
    """Pixels from left and top up to, but not with, right and bottom."""

    left: int
    top: int
    right: int
    bottom: int

    def widened(self, pixels: int, width: int, height: int) -> "_Area":
        """Return the area with so many pixels more on each side, as far as they are in the picture."""
        return _Area(
            max(0, self.left - pixels),
            max(0, self.top - pixels),
            min(width, self.right + pixels),
            min(height, self.bottom + pixels),
        )

    def slices(self, origin: "_Area | None" = None) -> tuple[slice, slice]:
        """Return its rows and columns, counted from the corner of another area."""
        x, y = (origin.left, origin.top) if origin else (0, 0)
        return slice(self.top - y, self.bottom - y), slice(self.left - x, self.right - x)


def cover(pixels: Pixels, boxes: Iterable[Box], options: BlurOptions) -> Pixels:
    """Return a picture (H W 3) in which boxes are covered; the pixels outside are the same to the bit.

    The picture itself stays as it is.
    """
    result = pixels.copy()
    for box in sorted(set(boxes)):
        _cover_box(result, box, options)
    return result


def kernel_of(longer: int, options: BlurOptions) -> tuple[int, float]:
    """Return size (odd) and standard deviation of the blur for a box of that longer side, in pixels.

    The size asked for, but at least half of the box: what is left then is a few spots of colour, whatever
    the resolution. More than the whole box would only mix its surroundings in.
    """
    asked = options.strength | 1
    size = min(max(asked, math.ceil(longer * LEAST_OF_BOX) | 1), longer | 1)
    return size, max(options.sigmax * size / asked, LEAST_SIGMA * size)


def _cover_box(pixels: Pixels, box: Box, options: BlurOptions) -> None:
    """Cover a box in place."""
    height, width = pixels.shape[:2]
    left, top, right, bottom = _grown(box, options.margin)
    whole = _Area(math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
    feather = round(options.feather * min(right - left, bottom - top))
    area = whole.widened(feather, width, height)
    if area.left >= area.right or area.top >= area.bottom:
        return  # outside of the picture
    there = area.slices()
    if options.method == "fill":
        covered = np.zeros_like(pixels[there])
    else:
        size, sigma = kernel_of(max(whole.right - whole.left, whole.bottom - whole.top), options)
        # with what is around it: else its edges would be made of themselves
        around = area.widened(size // 2, width, height)
        covered = blurred(pixels[around.slices()], size, sigma)[area.slices(around)]
    if not options.ellipse and feather == 0:
        pixels[there] = covered
        return
    weight = _weights(area, whole, (left, top, right, bottom) if options.ellipse else None, feather)
    plain = pixels[there].astype(np.float32)
    mixed = plain + weight[..., None] * (covered.astype(np.float32) - plain)
    pixels[there] = np.rint(mixed).astype(pixels.dtype)


def blurred(pixels: Pixels, size: int, sigma: float) -> Pixels:
    """Return pixels under a Gaussian of that size (odd) and standard deviation.

    Large ones are made on a reduced copy, which is fast and leaves nothing finer behind to be restored.
    """
    height, width = pixels.shape[:2]
    factor = max(1, size // COARSE)
    kernel = (size // factor) | 1
    image: Any = np.ascontiguousarray(pixels)
    if factor > 1:
        small = (-(-width // factor), -(-height // factor))
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    image = cv2.GaussianBlur(image, (kernel, kernel), sigma / factor)
    if factor > 1:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    made: Pixels = image
    return made


def _weights(area: _Area, whole: _Area, ellipse: Box | None, feather: int) -> NDArray[np.float32]:
    """Return how much of the cover each pixel of an area gets: 1 inside, less and less in the soft edge."""
    x = np.arange(area.left, area.right, dtype=np.float32)[None]
    y = np.arange(area.top, area.bottom, dtype=np.float32)[:, None]
    if ellipse is None:
        across = np.maximum(np.maximum(whole.left - x, x - whole.right + 1), 0)
        down = np.maximum(np.maximum(whole.top - y, y - whole.bottom + 1), 0)
        outside = np.hypot(across, down)
    else:
        left, top, right, bottom = ellipse
        axes = max((right - left) / 2, 0.5), max((bottom - top) / 2, 0.5)
        radius = np.hypot((x + 0.5 - (left + right) / 2) / axes[0], (y + 0.5 - (top + bottom) / 2) / axes[1])
        outside = np.maximum(radius - 1, 0) * min(axes)
    soft = 1 - outside / (feather + 1) if feather else outside <= 0
    return np.clip(soft, 0, 1).astype(np.float32)


def _grown(box: Box, margin: float) -> Box:
    left, top, right, bottom = box
    across, down = margin * (right - left), margin * (bottom - top)
    return left - across, top - down, right + across, bottom + down
