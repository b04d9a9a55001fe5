"""Boxes in a picture: how much they overlap, and which of many overlapping ones to keep."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class FoundFace:
    """One thing that a detector has found, most often a face."""

    # left, top, right, bottom in pixels; it may reach outside the picture
    box: tuple[float, float, float, float]
    score: float  # 0..1
    # 5 2, x and y in pixels: the eyes, left one in the picture first, nose, corners of the mouth;
    # None: the detector does not tell
    landmarks: NDArray[np.float32] | None


class Detector(Protocol):
    """Finds faces, or whatever it was trained for."""

    def find(self, pixels: NDArray[np.uint8], least_score: float) -> Sequence[FoundFace]:
        """Return the boxes found in a picture (H W 3, RGB) with at least that score, best first."""


Numbers = NDArray[np.float32]  # boxes N 4: left, top, right, bottom; scores N


def overlaps(box: Numbers, others: Numbers) -> Numbers:
    """Return the area that a box (4) shares with each of the others (N 4), as part of their union."""
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=1)
    both = np.prod(box[2:] - box[:2]) + np.prod(others[:, 2:] - others[:, :2], axis=1) - shared
    result: Numbers = shared / np.maximum(both, 1e-9)
    return result


def best_of(boxes: Numbers, scores: Numbers, most_overlap: float, most: int | None = None) -> list[int]:
    """Return the places of boxes that overlap no better one by more than that, best first.

    Known as non-maximum suppression. most: how many at most. Of equal scores the first one is better. A box
    that is not finite overlaps nothing.
    """
    waiting = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(waiting) and (most is None or len(kept) < most):
        best, waiting = int(waiting[0]), waiting[1:]
        kept.append(best)
        waiting = waiting[~(overlaps(boxes[best], boxes[waiting]) > most_overlap)]
    return kept


def shrunk(pixels: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """Return a picture (H W 3) of that part of its size, each side at least one pixel; 1 leaves it alone."""
    if factor == 1:
        return pixels
    height, width = (max(1, round(side * factor)) for side in pixels.shape[:2])
    # the mean of what falls together: small faces stay whole, where sharper filters would alias
    small: NDArray[np.uint8] = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    return small
