"""Measure images and clips: brightness, black, stillness, sharpness, hashes of copies, and scene cuts.

A frame is `H W 3` uint8 RGB; the frames of a clip are a sequence of those, all of one size, for example some
that were sampled evenly (F H W 3 works too). Equal frames give equal values. All measures are taken at a
fixed size, so that they hardly depend on the resolution.
"""

# Letters: H, W height and width; h, w those of a reduced image

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from modules.media.encoding import Pixels, in_eight_bits
from modules.media.reading import Frame

Gray = NDArray[np.float32]  # h w, 0..1

# Rec. 601, as in FFmpeg and Pillow
LUMA = np.array((0.299, 0.587, 0.114), np.float32)

BLACK_PIXEL = 0.10  # as fraction of the range, and fraction of such pixels, as in FFmpeg's blackdetect
BLACK_FRACTION = 0.98
BLACK_SIDE = 128

# Fraction of the range. A keyframe of a compressed still differs from neighbors by up to 0.006 in a cell.
STATIC_CHANGE = 0.012
CELLS = 32  # cells along the shorter side; in a portrait, a talking mouth fills several

SHARP_SIDE = 512  # about the training size: blur that vanishes at this size is harmless
SMOOTHING = 1.0  # pixels, before the Laplacian, so that rounding and noise do not count as sharp
TILES = 8  # rows and columns
SHARP_FRACTION = 0.25  # fraction of tiles: a portrait with a blurred background is sharp
# twenty photographs in focus have 0.0065 to 0.2; Gaussian blur of 0.6 % of their width leaves less in most
BLURRED = 0.002

FLAT = 0.008  # standard deviation of gray values below which there is no structure: two of 255 steps
HASH_SIDE, HASH_BLOCK = 32, 8
NEAR = 6  # maximum differing bits of copies; unrelated images differ in about 31
CLIP_FRAMES = 4  # frames whose hashes make up a clip's


def brightness(frame: Frame) -> float:
    """Return the mean gray value of a frame, 0..255."""
    return float(_reduce_to_gray(frame, BLACK_SIDE).mean())


def is_black(frame: Frame, threshold: float = BLACK_PIXEL, fraction: float = BLACK_FRACTION) -> bool:
    """Return whether `fraction` of the pixels have luma below `threshold`, like FFmpeg's blackdetect."""
    return bool((_reduce_to_gray(frame, BLACK_SIDE) < threshold).mean() >= fraction)


def motion(frames: Sequence[Frame]) -> float:
    """Return the mean absolute change of luma between neighboring frames, 0..1; 0 for a single frame.

    If neighbors are some tenths of a second apart, 0.01 means little motion and 0.1 strong motion.
    """
    cells = [_average_cells(frame) for frame in frames]
    changes = [np.abs(after - before).mean() for before, after in zip(cells, cells[1:], strict=False)]
    return float(np.mean(changes)) if changes else 0.0


def is_static(frames: Sequence[Frame], threshold: float = STATIC_CHANGE) -> bool:
    """Return whether nothing moves: no cell of a grid changes its luma by `threshold` between any two frames.

    The grid has 32 cells along the shorter side. The largest change of a cell counts instead of the mean,
    because in a portrait only a small part moves. All pairs of frames are compared to detect slow motion too.
    A single frame is static.
    """
    cells = (_average_cells(frame) for frame in frames)
    low = high = next(cells, None)
    if low is None or high is None:
        raise ValueError("no frame to measure")
    for cell in cells:
        low, high = np.minimum(low, cell), np.maximum(high, cell)
    return bool((high - low).max() < threshold)


def sharpness(frame: Frame) -> float:
    """Return the sharpness of the sharpest quarter of a frame; 0 for a frame without structure.

    The frame is reduced to 512 pixels on its longer side (a smaller one keeps its size). Then
    mean(L^2 in the sharpest quarter of 8 x 8 tiles) / variance of the luma, where L is the Laplacian of the
    luma smoothed by a Gaussian of 1 pixel, which removes noise and rounding. Without the division,
    brightness and contrast would count.
    Source: variance of the Laplacian, Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield
    microscopy", ICPR; tiles, smoothing and division are our additions.
    """
    gray = _reduce_to_gray(frame, SHARP_SIDE)
    variance = float(gray.var())
    if variance < FLAT**2:
        return 0.0
    smooth = cv2.GaussianBlur(gray, (0, 0), SMOOTHING)
    squares = np.square(cv2.Laplacian(smooth, cv2.CV_32F, borderType=cv2.BORDER_REFLECT_101))
    tiles = np.sort(cv2.resize(squares, (TILES, TILES), interpolation=cv2.INTER_AREA).ravel())
    sharpest = tiles[-max(1, round(SHARP_FRACTION * tiles.size)) :]
    return float(sharpest.mean()) / variance


def is_flat(frame: Frame) -> bool:
    """Return whether a frame has (nearly) a single color, so that its sharpness cannot be measured."""
    return bool(_reduce_to_gray(frame, BLACK_SIDE).std() < FLAT)


def perceptual_hash(frame: Frame) -> int:
    """Return a 63-bit hash that hardly changes if a frame is rescaled, recompressed, brightened or darkened.

    The luma is reduced to 32 x 32 and transformed by a DCT; each of its 8 x 8 lowest terms except the
    constant one gives a bit, set if the term is above their median. Mirrored images differ. A flat frame
    gives 0.
    Source: Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1.
    Unlike Zauner, we keep the terms that are constant in one direction, because stripes have no others.
    """
    gray = cv2.resize(
        _reduce_to_gray(frame, BLACK_SIDE), (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA
    )
    if gray.std() < FLAT:
        return 0
    terms = cv2.dct(gray)[:HASH_BLOCK, :HASH_BLOCK].ravel()[1:]
    # rounded, so that rounding errors count as 0 on every machine
    is_above = np.round(terms, 4) > round(float(np.median(terms)), 4)
    return int("".join("1" if bit else "0" for bit in is_above), 2)


def clip_hash(frames: Sequence[Frame]) -> tuple[int, ...]:
    """Return the perceptual hashes of four frames, evenly from first to last; one hash for a single frame."""
    return tuple(map(perceptual_hash, hashed_frames(frames)))


def hashed_frames(frames: Sequence[Frame]) -> list[Frame]:
    """Select the frames of a clip whose hashes are compared, evenly from the first to the last.

    Raises:
        ValueError: If `frames` is empty.
    """
    if not len(frames):
        raise ValueError("no frame to measure")
    count = 1 if len(frames) == 1 else CLIP_FRAMES
    return [frames[index] for index in np.linspace(0, len(frames) - 1, count).round().astype(int)]


def _reduce_to_gray(frame: Frame, longest: int) -> Gray:
    return _reduce(frame, longest / max(frame.shape[:2]))


def _average_cells(frame: Frame) -> Gray:
    """Return the luma 0..1, averaged over a grid of CELLS along the shorter side if the frame is larger."""
    return _reduce(frame, CELLS / min(frame.shape[:2]))


def _reduce(frame: Frame, factor: float) -> Gray:
    height, width = frame.shape[:2]
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small: NDArray[Any] = np.ascontiguousarray(frame[..., :3])
    if factor < 1:
        small = cv2.resize(small, size, interpolation=cv2.INTER_AREA)
    return np.asarray(small.astype(np.float32) @ LUMA / np.float32(255), np.float32)


# Tell whether a new scene begins between two neighboring images.
#
# A cut changes both the structure and the colors at once. Motion moves things and keeps the colors; a flash
# or a fade changes the brightness and leaves everything in its place. So both distances have to be large.
LONG_SIDE = 32  # longer side of a thumbnail
MAX_SHIFT = 6  # maximum shift of the image in cells, in x and y
BINS = 16  # histogram bins per color
SMALL_CHANGE = 0.05  # fraction of the range; smaller average differences reduce the distance
FLAT_SCENE = 0.005  # deviation of the gray values below which there is no structure to compare
WHITE = 245  # of 255; at least this counts as white


@dataclass(frozen=True)
class Thumbnail:
    """A reduced image for comparisons: gray values, cells that are white, and a color histogram."""

    gray: NDArray[np.float32]  # h w, 0..1
    is_white: NDArray[np.bool_]  # h w: some color is at its maximum
    histogram: NDArray[np.float32]  # 3 BINS, each of a sum of 1


def thumbnail(pixels: Pixels) -> Thumbnail:
    """Reduce an image, H W 3, to a small gray image, its white cells and a color histogram."""
    height, width = pixels.shape[:2]
    factor = min(1.0, LONG_SIDE / max(height, width))
    columns = max(1, round(width * factor))
    rows = max(1, round(height * factor))
    # four times as fine for the colors, so that the histogram has enough samples
    fine = cv2.resize(in_eight_bits(pixels), (4 * columns, 4 * rows), interpolation=cv2.INTER_AREA)
    small = cv2.resize(fine, (columns, rows), interpolation=cv2.INTER_AREA)
    counts = []
    for color in range(3):
        bins = fine[..., color] // (256 // BINS)
        counts.append(np.bincount(bins.ravel(), minlength=BINS))
    histogram = (np.stack(counts) / (fine.shape[0] * fine.shape[1])).astype(np.float32)
    gray: NDArray[np.float32] = (small.astype(np.float32) @ LUMA) / np.float32(255)
    return Thumbnail(gray, small.max(axis=-1) >= WHITE, histogram)


def scene_distance(first: Thumbnail, second: Thumbnail, minimum: float = 0.0) -> float:
    """Return a score for a scene cut, from 0 to 1: sqrt(structure * colors) * min(1, change / 0.05).

    - structure is 1 minus the best correlation of the gray thumbnails over all shifts of up to 6 of 32 cells,
      from 0 to 1. Cells that are white in either frame are ignored, because a flash may hide them. If less
      than a quarter is left, or the rest is uniformly gray in either frame, structure is 0.
    - colors is half the absolute difference of the histograms, averaged over red, green and blue.
    - change is the mean absolute difference of the gray values.

    Scores below `minimum` may be returned as 0, which saves time.
    """
    colors = float(np.abs(first.histogram - second.histogram).sum() / 6)
    change = float(np.abs(first.gray - second.gray).mean())
    change_weight = min(1.0, change / SMALL_CHANGE)
    # an upper bound before comparing: 1 minus the correlation of an image and its negative
    max_structure = 2.0
    if colors * change_weight == 0 or float(np.sqrt(max_structure * colors)) * change_weight < minimum:
        return 0.0
    height, width = first.gray.shape
    max_y = min(MAX_SHIFT, height // 4)
    max_x = min(MAX_SHIFT, width // 4)
    best = _correlate(first, second, 0, 0)
    if best is None:  # structure cannot be compared: count it as 0
        return 0.0
    for y in range(-max_y, max_y + 1):
        for x in range(-max_x, max_x + 1):
            best = max(best, _correlate(first, second, y, x) or 0.0)
    structure = 1 - min(1.0, best)
    return float(np.sqrt(structure * colors)) * change_weight


def _correlate(first: Thumbnail, second: Thumbnail, y: int, x: int) -> float | None:
    """Correlate the first thumbnail, shifted by y and x, with the second, without cells white in either."""
    # The result is None if too few cells are left, or if they are uniformly gray in either thumbnail.
    height, width = first.gray.shape
    # the part of each thumbnail that overlaps the other one after the shift
    first_area = slice(max(0, y), height + min(0, y)), slice(max(0, x), width + min(0, x))
    second_area = slice(max(0, -y), height + min(0, -y)), slice(max(0, -x), width + min(0, -x))
    is_used = ~(first.is_white[first_area] | second.is_white[second_area])
    if is_used.sum() < is_used.size / 4:
        return None
    first_values = _center(first.gray[first_area][is_used])
    second_values = _center(second.gray[second_area][is_used])
    first_deviation = float(np.sqrt(np.square(first_values).mean()))
    second_deviation = float(np.sqrt(np.square(second_values).mean()))
    if min(first_deviation, second_deviation) < FLAT_SCENE:
        return None
    return float((first_values * second_values).mean()) / (first_deviation * second_deviation)


def _center(values: Gray) -> Gray:
    """Subtract the mean from gray values."""
    return values - values.mean()


def clock_time(time: Fraction) -> str:
    """Format a time in seconds as 0:07.250."""
    thousandths = round(time * 1000)
    return f"{thousandths // 60000}:{thousandths % 60000 / 1000:06.3f}"
