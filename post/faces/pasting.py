"""Put restored faces back to where they were, through soft masks."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from post.contract import Pixels
from post.faces.alignment import TEMPLATE_SIZE, Matrix
from post.sizes import enlarged_size

# of masks of `TEMPLATE_SIZE`, those of other sizes in proportion
BLUR, SIGMA, BLUR_TIMES = 101, 11.0, 2
FREE = 10  # pixels at the edge of a face that are never pasted
Plane = NDArray[np.float32]


@dataclass(frozen=True)
class Restored:
    """A restored face and how it goes back."""

    face: Plane  # S S 3, RGB, 0..1
    mask: Plane  # S S, 0..1: how much of it is shown


def soften(is_face: NDArray[np.bool_]) -> Plane:
    """Return the mask of a face, S S, 0..1, with soft edges, of where the face is."""
    scale = len(is_face) / TEMPLATE_SIZE
    kernel = 2 * round(BLUR // 2 * scale) + 1
    mask = is_face.astype(np.float32)
    for _ in range(BLUR_TIMES):
        mask = cv2.GaussianBlur(mask, (kernel, kernel), SIGMA * scale)  # type: ignore[assignment]
    free = max(1, round(FREE * scale))
    mask[:free] = mask[-free:] = 0
    mask[:, :free] = mask[:, -free:] = 0
    return mask


def enlarge(pixels: Pixels, upscale: float) -> Pixels:
    """Return a picture at that many times its size; the same object for 1."""
    height, width = pixels.shape[:2]
    size = enlarged_size(width, height, upscale)
    if size == (width, height):
        return pixels
    # the sharp filter would alias where pictures shrink
    sharp_or_mean = cv2.INTER_LANCZOS4 if upscale > 1 else cv2.INTER_AREA
    result: Pixels = cv2.resize(pixels, size, interpolation=sharp_or_mean)  # type: ignore[assignment]
    return result


def deepen(pixels: Pixels) -> Pixels:
    """Return pixels with 16 bits a channel; no value changes but for its unit."""
    return pixels if pixels.dtype == np.uint16 else pixels.astype(np.uint16) * np.uint16(257)


def paste(
    pixels: Pixels, matrices: Sequence[Matrix], faces: Iterable[Restored], size: int, upscale: float
) -> Pixels:
    """Return the enlarged picture (H W 3) with faces in it; where all masks are 0 no value changes.

    matrices: how each face was cut out, size x size. faces: taken one at a time, so that those of a crowd
    need not be in memory together. Of faces that overlap, later ones lie above earlier ones; all is rounded
    once.
    """
    canvas = enlarge(pixels, upscale)
    to_canvas = _to_canvas(pixels, canvas)
    back = [to_canvas @ _whole(cv2.invertAffineTransform(matrix)) for matrix in matrices]
    areas = [_area(matrix, size, (canvas.shape[1], canvas.shape[0])) for matrix in back]
    left, top = (min(area[side] for area in areas) for side in (0, 1))
    right, bottom = (max(area[side] for area in areas) for side in (2, 3))
    if left >= right or top >= bottom:
        return canvas
    most = float(np.iinfo(canvas.dtype).max)
    region = canvas[top:bottom, left:right].astype(np.float32)
    for (x0, y0, x1, y1), matrix, face in zip(areas, back, faces, strict=True):
        if x0 >= x1 or y0 >= y1:
            continue
        here = matrix[:2] - np.array([[0, 0, x0], [0, 0, y0]])
        shown = cv2.warpAffine(face.mask, here, (x1 - x0, y1 - y0))[..., None]
        colours = cv2.warpAffine(face.face, here, (x1 - x0, y1 - y0)) * most
        part = region[y0 - top : y1 - top, x0 - left : x1 - left]
        part[:] = shown * colours + (1 - shown) * part
    # a copy: the picture itself belongs to whoever gave it
    result: Pixels = canvas.copy()
    result[top:bottom, left:right] = np.rint(region).clip(0, most)
    return result


def _to_canvas(pixels: Pixels, canvas: Pixels) -> Matrix:
    """Return what takes places in the picture to places in the enlarged one, 3 3; pixels have centres."""
    across, down = canvas.shape[1] / pixels.shape[1], canvas.shape[0] / pixels.shape[0]
    return np.array([[across, 0, (across - 1) / 2], [0, down, (down - 1) / 2], [0, 0, 1]])


def _whole(matrix: object) -> Matrix:
    return np.vstack([np.asarray(matrix, dtype=np.float64), [0, 0, 1]])


def _area(matrix: Matrix, size: int, limits: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of where a face of that size falls in a picture of those sides."""
    corners = np.array([[-1, -1, 1], [size, -1, 1], [-1, size, 1], [size, size, 1]]) @ matrix[:2].T
    low, high = corners.min(axis=0), corners.max(axis=0)
    left, top = (max(0, math.floor(value)) for value in low)
    right, bottom = (min(limit, math.ceil(value) + 1) for limit, value in zip(limits, high, strict=True))
    return left, top, right, bottom
