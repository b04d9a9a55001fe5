"""Vary pictures each time they are trained: colours, place of the crop, mirroring.

Pictures are H W C uint8 RGB. All draws come from the generator that is passed in.
"""

import random
import re
from dataclasses import dataclass, replace

import cv2
import numpy as np

from modules.media.buckets import Fit, Size, how_to_resize
from modules.media.reading import Frame

COLOUR_RATE = 1 / 3  # of pictures whose colours change, as image trainers do it
MOST_HUE = 8  # of 180 steps of a colour wheel, either way
GAMMAS = (0.95, 1.05)

_FACE = re.compile(r"_(\d+)_(\d+)_(\d+)_(\d+)$")


@dataclass(frozen=True)
class Face:
    """Where a face is in a picture, in pixels."""

    x: int  # of its middle
    y: int
    width: int
    height: int


def change_colours(frame: Frame, numbers: random.Random) -> Frame:
    """Return the picture; with probability COLOUR_RATE, with its hue turned or its gamma changed a little."""
    if numbers.random() >= COLOUR_RATE:
        return frame
    if numbers.random() < 0.5:
        turn = numbers.uniform(-MOST_HUE, MOST_HUE)
        hsv = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV).astype(np.float32)
        hsv[..., 0] = (hsv[..., 0] + turn) % 180
        turned = np.minimum(np.rint(hsv), 255).astype(np.uint8)
        turned[..., 0] %= 180
        return np.asarray(cv2.cvtColor(turned, cv2.COLOR_HSV2RGB), dtype=np.uint8)
    gamma = numbers.uniform(*GAMMAS)
    table = np.rint((np.arange(256) / 255) ** gamma * 255).astype(np.uint8)
    return table[frame]


def crop_anywhere(fit: Fit, numbers: random.Random) -> Fit:
    """Return the fit with a random place of the crop, all equally likely."""
    left, top = (
        numbers.randint(0, max(0, whole - part)) for whole, part in zip(fit.resized, fit.bucket, strict=True)
    )
    return replace(fit, crop=(left, top))


def face_in_name(stem: str) -> Face | None:
    """Return the face that a file's name gives: it ends in `_x_y_width_height`, x and y of the middle."""
    found = _FACE.search(stem)
    return None if found is None else Face(*(int(part) for part in found.groups()))


def fit_face(
    size: Size,
    bucket: Size,
    face: Face,
    sides: tuple[float, float],
    numbers: random.Random,
    anywhere: bool = False,
) -> Fit:
    """Return how to crop a picture around a face.

    The number of faces that fit along the bucket's short side is drawn between `sides`. The picture covers
    the bucket, and is not enlarged just to reach that number. The face is in the middle, or with `anywhere`
    at any place where it is whole.
    """
    longer = max(face.width, face.height, 1)
    cover = max(bucket[0] / size[0], bucket[1] / size[1])
    wanted = min(bucket) / (longer * numbers.uniform(*sides))
    scale = max(cover, min(wanted, 1.0))
    resized = (max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale)))
    left = _start((face.x, face.width), scale, bucket[0], resized[0], numbers, anywhere)
    top = _start((face.y, face.height), scale, bucket[1], resized[1], numbers, anywhere)
    return Fit(resized, (left, top), bucket, how_to_resize(size, resized))


def _start(
    face: tuple[int, int], scale: float, part: int, whole: int, numbers: random.Random, anywhere: bool
) -> int:
    """Return where a crop of length `part` begins on one axis. face: its middle and its length."""
    middle, length = face[0] * scale, face[1] * scale
    start = middle - part / 2
    if anywhere and length < part:
        start = numbers.uniform(middle + length / 2 - part, middle - length / 2)
    return min(max(0, round(start)), whole - part)


def mirror(frame: Frame) -> Frame:
    return np.ascontiguousarray(frame[:, ::-1])
