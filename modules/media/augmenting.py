"""Augment images at each training step: colors, crop position, mirroring.

Images are H W C uint8 RGB. All random numbers come from the given generator.
"""

import random
import re
from dataclasses import dataclass, replace

import cv2
import numpy as np

from modules.media.buckets import Fit, Size, select_interpolation
from modules.media.reading import Frame

COLOR_RATE = 1 / 3  # fraction of images whose colors change, as in image trainers
MAX_HUE = 8  # of 180 hue steps, in both directions
GAMMAS = (0.95, 1.05)

_FACE = re.compile(r"_(\d+)_(\d+)_(\d+)_(\d+)$")


@dataclass(frozen=True)
class Face:
    """Position and size of a face in an image, in pixels."""

    x: int  # x of its center
    y: int
    width: int
    height: int


def change_colors(frame: Frame, rng: random.Random) -> Frame:
    """Return the image; with probability COLOR_RATE, its hue or gamma is changed a little."""
    if rng.random() >= COLOR_RATE:
        return frame
    if rng.random() < 0.5:
        turn = rng.uniform(-MAX_HUE, MAX_HUE)
        hsv = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV).astype(np.float32)
        hsv[..., 0] = (hsv[..., 0] + turn) % 180
        changed = np.minimum(np.rint(hsv), 255).astype(np.uint8)
        changed[..., 0] %= 180
        return np.asarray(cv2.cvtColor(changed, cv2.COLOR_HSV2RGB), dtype=np.uint8)
    gamma = rng.uniform(*GAMMAS)
    table = np.rint((np.arange(256) / 255) ** gamma * 255).astype(np.uint8)
    return table[frame]


def crop_anywhere(fit: Fit, rng: random.Random) -> Fit:
    """Return the fit with its crop at a uniformly random position."""
    left, top = (
        rng.randint(0, max(0, side - part)) for side, part in zip(fit.resized, fit.bucket, strict=True)
    )
    return replace(fit, crop=(left, top))


def face_in_name(stem: str) -> Face | None:
    """Read a face from a file name that ends in `_x_y_width_height` (x, y: its center); None without one."""
    match = _FACE.search(stem)
    return None if match is None else Face(*(int(part) for part in match.groups()))


def fit_face(
    size: Size,
    bucket: Size,
    face: Face,
    side_per_face: tuple[float, float],
    rng: random.Random,
    anywhere: bool = False,
) -> Fit:
    """Return the scale and crop of an image around a face.

    The image is scaled so that the bucket's short side divided by the face's longer side is a random number
    from the range `side_per_face`. It always covers the bucket, and is not enlarged just to reach that ratio.
    The face is centered, or with `anywhere` at a random position where it is fully visible.
    """
    face_length = max(face.width, face.height, 1)
    covering_scale = max(bucket[0] / size[0], bucket[1] / size[1])
    random_scale = min(bucket) / (face_length * rng.uniform(*side_per_face))
    scale = max(covering_scale, min(random_scale, 1.0))
    resized = (max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale)))
    crop = []
    for axis, (center, length) in enumerate(((face.x, face.width), (face.y, face.height))):
        start = _choose_start(center * scale, length * scale, bucket[axis], rng if anywhere else None)
        crop.append(min(max(0, round(start)), resized[axis] - bucket[axis]))
    return Fit(resized, (crop[0], crop[1]), bucket, select_interpolation(size, resized))


def _choose_start(center: float, length: float, side: int, rng: random.Random | None) -> float:
    """Return where a crop of `side` pixels starts on an axis: centered on a face, or with `rng` around it."""
    # `center` and `length` are the face's, in the resized image.
    if rng is not None and length < side:
        return rng.uniform(center + length / 2 - side, center - length / 2)
    return center - side / 2


def mirror(frame: Frame) -> Frame:
    """Return a copy of a frame with left and right exchanged, in contiguous memory."""
    return np.ascontiguousarray(frame[:, ::-1])
