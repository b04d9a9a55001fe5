"""Measure pictures and clips: brightness, black, static, sharpness, and hashes by which copies are found.

A frame is `H W 3` uint8 RGB; the frames of a clip are a sequence of those, all of one size, for example some
that were sampled evenly (F H W 3 works too). Equal frames give equal numbers. All measures are taken at a
fixed size, so that they hardly depend on the resolution.
"""
# Letters: H, W height and width; h, w those of a reduced picture

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from modules.media.reading import Frame

Grey = NDArray[np.float32]  # h w, 0..1

# Rec. 601, as in FFmpeg and Pillow
LUMA = np.array((0.299, 0.587, 0.114), np.float32)

BLACK_PIXEL = 0.10  # of the range, and the share of such pixels: FFmpeg's blackdetect
BLACK_SHARE = 0.98
BLACK_SIDE = 128

# Of the range. A keyframe of a compressed still differs from its neighbours by up to 0.006 in a cell.
STATIC_CHANGE = 0.012
CELLS = 32  # of the shorter side: a mouth that talks fills several in a portrait

SHARP_SIDE = 512  # about what models are trained on: blur that is gone at this size does no harm
SMOOTHING = 1.0  # pixels, before the Laplacian: else rounding and noise count as sharp
TILES = 8  # rows and columns
SHARP_SHARE = 0.25  # of the tiles: a portrait before a soft background is sharp
# twenty photographs in focus have 0.0065 to 0.2; Gaussian blur of 0.6 % of their width leaves less in most
BLURRED = 0.002

FLAT = 0.008  # standard deviation of grey values below which there is no structure: two of 255 steps
HASH_SIDE, HASH_BLOCK = 32, 8
HASH_BITS = HASH_BLOCK * HASH_BLOCK - 1  # without the constant term
NEAR = 6  # bits that differ between copies, at most; pictures that have nothing in common differ in about 31
CLIP_FRAMES = 4  # whose hashes are a clip's


def brightness(frame: Frame) -> float:
    """Return the mean luma, from 0 (black) to 1 (white)."""
    return float(_grey(frame, BLACK_SIDE).mean())


def is_black(frame: Frame, threshold: float = BLACK_PIXEL, share: float = BLACK_SHARE) -> bool:
    """Return whether at least `share` of the pixels have a luma below `threshold` (0..1).

    Source: the defaults of FFmpeg's filter blackdetect.
    """
    return bool((_grey(frame, BLACK_SIDE) < threshold).mean() >= share)


def motion(frames: Sequence[Frame]) -> float:
    """Return the mean absolute change of luma between neighbours, in place: 0..1, and 0 for a single frame.

    0.01 is a calm picture, 0.1 a wild one, if neighbours are some tenths of a second apart.
    """
    cells = [_cells(frame) for frame in frames]
    changes = [np.abs(after - before).mean() for before, after in zip(cells, cells[1:], strict=False)]
    return float(np.mean(changes)) if changes else 0.0


def is_static(frames: Sequence[Frame], threshold: float = STATIC_CHANGE) -> bool:
    """Return whether nothing moves: no cell of a grid changes its luma by `threshold` between any two frames.

    The grid has 32 cells along the shorter side. The largest change counts, not the mean: in a portrait only
    a small part moves; and any two frames are compared, so that slow motion counts too. A single frame is
    static.
    """
    cells = (_cells(frame) for frame in frames)
    low = high = next(cells, None)
    if low is None or high is None:
        raise ValueError("no frame to measure")
    for cell in cells:
        low, high = np.minimum(low, cell), np.maximum(high, cell)
    return bool((high - low).max() < threshold)


def sharpness(frame: Frame) -> float:
    """Return how sharp the sharpest quarter of a frame is; 0 for a frame without structure.

    The frame is reduced to 512 pixels on its longer side (a smaller one keeps its size). Then
    mean(L^2 in the sharpest quarter of 8 x 8 tiles) / variance of the luma, where L is the Laplacian of the
    luma smoothed by a Gaussian of 1 pixel, which leaves noise and rounding out. Without the division
    brightness and contrast would count.
    Source: variance of the Laplacian, Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield
    microscopy", ICPR; tiles, smoothing and division are ours.
    """
    grey = _grey(frame, SHARP_SIDE)
    variance = float(grey.var())
    if variance < FLAT**2:
        return 0.0
    smooth = cv2.GaussianBlur(grey, (0, 0), SMOOTHING)
    squares = np.square(cv2.Laplacian(smooth, cv2.CV_32F, borderType=cv2.BORDER_REFLECT_101))
    tiles = np.sort(cv2.resize(squares, (TILES, TILES), interpolation=cv2.INTER_AREA).ravel())
    sharpest = tiles[-max(1, round(SHARP_SHARE * tiles.size)) :]
    return float(sharpest.mean()) / variance


def is_flat(frame: Frame) -> bool:
    """Return whether a frame has one colour, or nearly so: it can be neither sharp nor blurred."""
    return bool(_grey(frame, BLACK_SIDE).std() < FLAT)


def perceptual_hash(frame: Frame) -> int:
    """Return a hash of 63 bits that copies nearly share: rescaled, recompressed, brighter or darker ones.

    The luma is reduced to 32 x 32 and transformed by a DCT; each of its 8 x 8 lowest terms but the constant
    one gives a bit: whether it is above their median. Mirrored pictures differ. A flat frame gives 0.
    Source: Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1;
    it leaves out the terms that are constant in one direction, which we keep: stripes have no others.
    """
    grey = cv2.resize(_grey(frame, BLACK_SIDE), (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA)
    if grey.std() < FLAT:
        return 0
    terms = cv2.dct(grey)[:HASH_BLOCK, :HASH_BLOCK].ravel()[1:]
    # rounded: terms that are 0 but for rounding give 0 everywhere
    is_above = np.round(terms, 4) > round(float(np.median(terms)), 4)
    return int("".join("1" if bit else "0" for bit in is_above), 2)


def clip_hash(frames: Sequence[Frame]) -> tuple[int, ...]:
    """Return the hashes of four frames, evenly from the first to the last; of a single frame its own."""
    return tuple(map(perceptual_hash, hashed_frames(frames)))


def hashed_frames(frames: Sequence[Frame]) -> list[Frame]:
    """Return the frames of a clip whose hashes are its own. Raises ValueError if there is no frame."""
    if not len(frames):
        raise ValueError("no frame to measure")
    count = 1 if len(frames) == 1 else CLIP_FRAMES
    return [frames[place] for place in np.linspace(0, len(frames) - 1, count).round().astype(int)]


def _grey(frame: Frame, longest: int) -> Grey:
    """Return the luma 0..1 of a frame, reduced so that its longer side has at most `longest` pixels."""
    return _reduce(frame, longest / max(frame.shape[:2]))


def _cells(frame: Frame) -> Grey:
    """Return the luma 0..1 in a grid of CELLS along the shorter side; a smaller frame keeps its pixels."""
    return _reduce(frame, CELLS / min(frame.shape[:2]))


def _reduce(frame: Frame, factor: float) -> Grey:
    height, width = frame.shape[:2]
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    colours = np.ascontiguousarray(frame[..., :3])
    small = cv2.resize(colours, size, interpolation=cv2.INTER_AREA) if factor < 1 else colours
    return np.asarray(small.astype(np.float32) @ LUMA / np.float32(255), np.float32)
