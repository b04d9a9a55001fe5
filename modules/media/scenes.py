"""Tell whether a new scene begins between two neighbouring pictures.

A cut changes both the structure and the colours at once. Motion moves things and keeps the colours; a flash
or a fade changes the brightness and leaves everything in its place. So both distances have to be large.
"""

from dataclasses import dataclass
from fractions import Fraction

import cv2
import numpy as np
from numpy.typing import NDArray

from modules.media.depth import Pixels, in_eight_bits
from modules.media.measures import LUMA

LONG_SIDE = 32  # of a thumbnail
MOST_SHIFT = 6  # cells that all may have moved together, in x and y
BINS = 16  # of the histogram of each colour
SMALL_CHANGE = 0.05  # of the range: pictures that differ less on average count less
FLAT = 0.005  # deviation of the grey values below which there is no structure to compare
WHITE = 245  # of 255


@dataclass(frozen=True)
class Thumbnail:
    """Reduced picture for comparisons."""

    grey: NDArray[np.float32]  # h w, 0..1
    is_white: NDArray[np.bool_]  # h w: a colour is at its upper end
    histogram: NDArray[np.float32]  # 3 BINS, each of a sum of 1


def thumbnail(pixels: Pixels) -> Thumbnail:
    """Return the reduced form of a picture (H W 3)."""
    height, width = pixels.shape[:2]
    factor = min(1.0, LONG_SIDE / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    # twice as fine for the colours, so that the histogram has enough samples
    fine = cv2.resize(in_eight_bits(pixels), (4 * size[0], 4 * size[1]), interpolation=cv2.INTER_AREA)
    small = cv2.resize(fine, size, interpolation=cv2.INTER_AREA)
    shares = [
        np.bincount((fine[..., colour] // (256 // BINS)).ravel(), minlength=BINS) for colour in range(3)
    ]
    histogram = (np.stack(shares) / (fine.shape[0] * fine.shape[1])).astype(np.float32)
    grey: NDArray[np.float32] = (small.astype(np.float32) @ LUMA) / np.float32(255)
    return Thumbnail(grey, small.max(axis=-1) >= WHITE, histogram)


def scene_distance(first: Thumbnail, second: Thumbnail, least: float = 0.0) -> float:
    """Return the evidence for a cut, from 0 to 1: sqrt(structure * colours) * min(1, change / 0.05).

    structure: 1 minus the best correlation of the grey thumbnails over all shifts of up to 6 cells of 32,
    from 0 to 1. Cells that are white in either do not count: a flash hides them. If less than a quarter is
    left, or the rest has a single grey in either, the structure counts 0. colours: half the absolute
    difference of the histograms, the mean of red, green and blue. change: the mean absolute difference of the
    grey values. least: a distance below that may be given as 0, which takes less time.
    """
    colours = float(np.abs(first.histogram - second.histogram).sum() / 6)
    change = float(np.abs(first.grey - second.grey).mean())
    smallness = min(1.0, change / SMALL_CHANGE)
    most_structure = 2.0  # of pictures that are each other's negatives
    if colours * smallness == 0 or float(np.sqrt(most_structure * colours)) * smallness < least:
        return 0.0
    return float(np.sqrt(_structure(first, second) * colours)) * smallness


def _structure(first: Thumbnail, second: Thumbnail) -> float:
    """Return 1 minus the highest correlation over all shifts; brightness and contrast do not matter."""
    height, width = first.grey.shape
    most_y, most_x = min(MOST_SHIFT, height // 4), min(MOST_SHIFT, width // 4)
    best = _correlation(first, second, 0, 0)
    if best is None:
        return 0.0
    for y in range(-most_y, most_y + 1):
        for x in range(-most_x, most_x + 1):
            best = max(best, _correlation(first, second, y, x) or 0.0)
    return 1 - min(1.0, best)


def _correlation(first: Thumbnail, second: Thumbnail, y: int, x: int) -> float | None:
    """Return the correlation where the first, shifted, and the second overlap and are not white.

    None: too little is left, or the rest has a single grey in either.
    """
    height, width = first.grey.shape
    here = slice(max(0, y), height + min(0, y)), slice(max(0, x), width + min(0, x))
    there = slice(max(0, -y), height + min(0, -y)), slice(max(0, -x), width + min(0, -x))
    is_seen = ~(first.is_white[here] | second.is_white[there])
    if 4 * is_seen.sum() < is_seen.size:
        return None
    own, other = first.grey[here][is_seen], second.grey[there][is_seen]
    own, other = own - own.mean(), other - other.mean()
    spreads = float(np.sqrt(np.square(own).mean())), float(np.sqrt(np.square(other).mean()))
    if min(spreads) < FLAT:
        return None
    return float((own * other).mean()) / (spreads[0] * spreads[1])


def clock_time(time: Fraction) -> str:
    """Return a time in seconds as 0:07.250."""
    thousandths = round(time * 1000)
    return f"{thousandths // 60000}:{thousandths % 60000 / 1000:06.3f}"
