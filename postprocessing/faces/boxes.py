"""Boxes in an image: non-maximum suppression, and aligned square crops of the faces in them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from modules.media.encoding import Pixels


@dataclass(frozen=True)
class FoundFace:
    """A detection, usually a face: box, score and landmarks."""

    # left, top, right, bottom in pixels; it may reach outside the image
    box: tuple[float, float, float, float]
    score: float  # 0..1
    # 5 2, x and y in pixels: the eyes, left one in the image first, nose, corners of the mouth;
    # None if the detector finds none
    landmarks: NDArray[np.float32] | None


class Detector(Protocol):
    """Detects faces, or other objects that its network was trained for."""

    def find(self, pixels: NDArray[np.uint8], least_score: float) -> Sequence[FoundFace]:
        """Return the detections in an image (H W 3, RGB) with at least `least_score`, best first."""


Numbers = NDArray[np.float32]  # boxes N 4: left, top, right, bottom; scores N


def overlaps(box: Numbers, boxes: Numbers) -> Numbers:
    """Return the intersection over union of a box (4) with each of several boxes (N 4)."""
    low = np.maximum(box[:2], boxes[:, :2])
    high = np.minimum(box[2:], boxes[:, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=1)
    both = np.prod(box[2:] - box[:2]) + np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) - shared
    result: Numbers = shared / np.maximum(both, 1e-9)
    return result


def select_best(boxes: Numbers, scores: Numbers, max_overlap: float, maximum: int | None = None) -> list[int]:
    """Select boxes by non-maximum suppression; return their indices, best first.

    A box is dropped if a better one overlaps it by more than `max_overlap`. Of equal scores the first
    counts as better. A box that is not finite overlaps nothing.

    Args:
        boxes: Boxes, N 4.
        scores: Scores, N.
        max_overlap: Largest allowed intersection over union.
        maximum: Largest number of indices.
    """
    candidates = np.argsort(-scores, kind="stable")
    selected: list[int] = []
    while len(candidates) and (maximum is None or len(selected) < maximum):
        best = int(candidates[0])
        candidates = candidates[1:]
        selected.append(best)
        # not `<=`: NaN compares as false, so boxes with NaN stay
        candidates = candidates[~(overlaps(boxes[best], boxes[candidates]) > max_overlap)]
    return selected


def shrunk(pixels: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """Downscale an image (H W 3) by `factor` to at least 1 x 1 pixels; unchanged if the factor is 1."""
    if factor == 1:
        return pixels
    height, width = (max(1, round(side * factor)) for side in pixels.shape[:2])
    # the mean of the pixels that merge: small faces stay whole, sharper filters would alias
    small: NDArray[np.uint8] = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    return small


@dataclass(frozen=True)
class Area:
    """A rectangle of pixels; left and top are inclusive, right and bottom exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def is_empty(self) -> bool:
        """Whether the rectangle has no pixels."""
        return self.left >= self.right or self.top >= self.bottom

    def widened(self, pixels: int, width: int, height: int) -> "Area":
        """Return the area enlarged by `pixels` on each side, clipped to an image of width x height."""
        return Area(
            max(0, self.left - pixels),
            max(0, self.top - pixels),
            min(width, self.right + pixels),
            min(height, self.bottom + pixels),
        )

    def slices(self, origin: "Area | None" = None) -> tuple[slice, slice]:
        """Return the slices of the rectangle's rows and columns, relative to `origin` or to the image."""
        x, y = (origin.left, origin.top) if origin else (0, 0)
        return slice(self.top - y, self.bottom - y), slice(self.left - x, self.right - x)


# Align faces, and crop the square images that the networks restore.
Matrix = NDArray[np.float64]  # 2 3: maps a position (x, y, 1) in one image to (x, y) in another

# landmark positions in an aligned face of 512 x 512 pixels, with which the networks were trained (FFHQ)
TEMPLATE_SIZE = 512
TEMPLATE = np.array(
    [
        (192.98138, 239.94708),
        (318.90277, 240.1936),
        (256.63416, 314.01935),
        (201.26117, 371.41043),
        (313.08905, 371.15118),
    ],
    dtype=np.float32,
)
BORDER = (132, 133, 135)  # RGB color outside the image, also used to train the networks
MIN_EYE_DISTANCE = 5.0  # pixels; restoring smaller faces does not improve them


def restorable(faces: Sequence[FoundFace], size: tuple[int, int], only_center: bool) -> list[FoundFace]:
    """Return the faces that can be restored: those with landmarks, and with a large enough eye distance.

    Args:
        faces: Found faces.
        size: Width and height of the image.
        only_center: Whether to return only the face whose box is nearest to the center.
    """
    large = [face for face in faces if eye_distance(face.landmarks) >= MIN_EYE_DISTANCE]
    if not only_center:
        return large

    def distance_to_center(face: FoundFace) -> float:
        left, top, right, bottom = face.box
        # twice the distance, which is sufficient for sorting
        return math.hypot(left + right - size[0], top + bottom - size[1])

    return sorted(large, key=distance_to_center)[:1]


def eye_distance(landmarks: NDArray[np.float32] | None) -> float:
    """Return the distance between the eyes in pixels; 0 for a face without valid landmarks."""
    if landmarks is None or not np.isfinite(landmarks).all():
        return 0.0
    return float(np.hypot(*(landmarks[0] - landmarks[1])))


def alignment(landmarks: NDArray[np.float32], size: int) -> Matrix | None:
    """Return the affine matrix (2 3) that aligns the landmarks of a face with the template.

    The matrix rotates, scales and shifts, and is fitted by least median of squares, which ignores one wrong
    landmark. None if no matrix fits.

    Args:
        landmarks: Eyes, nose and corners of the mouth, 5 2: x and y in pixels.
        size: Side of the square image of the aligned face, in pixels.
    """
    matrix, _ = cv2.estimateAffinePartial2D(
        np.asarray(landmarks, dtype=np.float32), TEMPLATE * np.float32(size / TEMPLATE_SIZE), method=cv2.LMEDS
    )
    if matrix is None or not np.isfinite(matrix).all():
        return None
    # the determinant of a scaled rotation is the square of the scale
    scale = math.sqrt(abs(float(np.linalg.det(matrix[:, :2]))))
    # landmarks at one point, or far apart, do not form a face
    return matrix.astype(np.float64) if 1e-3 < scale < 1e3 else None


def crop(pixels: Pixels, matrix: Matrix, size: int) -> Pixels:
    """Align and crop a face (size size 3) from an image (H W 3), in the image's dtype."""
    wide = pixels.dtype == np.uint16
    border = [value * 257 for value in BORDER] if wide else BORDER
    face: Pixels = cv2.warpAffine(  # type: ignore[assignment]
        pixels, matrix, (size, size), borderMode=cv2.BORDER_CONSTANT, borderValue=border
    )
    return face


def crops(pixels: Pixels, matrices: Sequence[Matrix], size: int) -> NDArray[np.float32]:
    """Align and crop a face with each matrix: B 3 size size, -1..1."""
    maximum = np.float32(65535 if pixels.dtype == np.uint16 else 255)
    faces = np.stack([crop(pixels, matrix, size) for matrix in matrices])
    return faces.transpose(0, 3, 1, 2).astype(np.float32) / maximum * 2 - 1
