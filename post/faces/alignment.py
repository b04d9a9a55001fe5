"""Where faces lie, and the square pictures of them that the networks restore."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from post.contract import Pixels
from post.faces.boxes import FoundFace

Matrix = NDArray[np.float64]  # 2 3: places x, y, 1 in one picture -> x, y in another

# where the landmarks lie in a face of 512 x 512 pixels, as the networks were trained (FFHQ)
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
BORDER = (132, 133, 135)  # around the picture, in RGB: as the networks know it
LEAST_EYE_DISTANCE = 5.0  # pixels; nothing is gained with smaller faces


def restorable(found: Sequence[FoundFace], size: tuple[int, int], only_center: bool) -> list[FoundFace]:
    """Return the faces that can be restored: they have landmarks, and their eyes are far enough apart.

    size: width and height of the picture. only_center: of these, the one whose box lies nearest the centre.
    """
    faces = [face for face in found if eye_distance(face.landmarks) >= LEAST_EYE_DISTANCE]
    if not only_center:
        return faces

    def away(face: FoundFace) -> float:
        left, top, right, bottom = face.box
        return math.hypot(left + right - size[0], top + bottom - size[1])

    return sorted(faces, key=away)[:1]


def eye_distance(landmarks: NDArray[np.float32] | None) -> float:
    """Return the distance between the eyes in pixels; 0 for a face without landmarks, or with broken ones."""
    if landmarks is None or not np.isfinite(landmarks).all():
        return 0.0
    return float(np.hypot(*(landmarks[0] - landmarks[1])))


def alignment(landmarks: NDArray[np.float32], size: int) -> Matrix | None:
    """Return the turn, scale and shift from a picture to a face of size x size pixels.

    landmarks: 5 2, as `FoundFace.landmarks`. It is the least median of squares: one wrong landmark does not
    count. None if these landmarks are nothing that can be laid on a face.
    """
    matrix, _ = cv2.estimateAffinePartial2D(
        np.asarray(landmarks, dtype=np.float32), TEMPLATE * np.float32(size / TEMPLATE_SIZE), method=cv2.LMEDS
    )
    if matrix is None or not np.isfinite(matrix).all():
        return None
    scale = math.sqrt(abs(float(np.linalg.det(matrix[:, :2]))))
    return matrix.astype(np.float64) if 1e-3 < scale < 1e3 else None


def crop(pixels: Pixels, matrix: Matrix, size: int) -> Pixels:
    """Return a face, size x size x 3, of a picture (H W 3), in its dtype."""
    wide = pixels.dtype == np.uint16
    border = [value * 257 for value in BORDER] if wide else BORDER
    face: Pixels = cv2.warpAffine(  # type: ignore[assignment]
        pixels, matrix, (size, size), borderMode=cv2.BORDER_CONSTANT, borderValue=border
    )
    return face


def crops(pixels: Pixels, matrices: Sequence[Matrix], size: int) -> NDArray[np.float32]:
    """Return the faces at the matrices' places as B 3 size size, -1..1."""
    most = np.float32(65535 if pixels.dtype == np.uint16 else 255)
    faces = np.stack([crop(pixels, matrix, size) for matrix in matrices])
    return faces.transpose(0, 3, 1, 2).astype(np.float32) / most * 2 - 1
