"""Sizes of reference images: a single one is kept whole on a canvas, several are cropped to multiples of 16.

Source: the released code (BFL, flux-3-image-klein, `reference_canvas` and `prepare_multi_reference`).
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from encoders.pictures import read_reference
from modules.integers import round_up
from modules.media.buckets import Fit, Size, fit_within
from modules.media.reading import image_size, read_image, resize_frame

MAX_PIXELS, MAX_SIDE = 4 * 1024 * 1024, 4096  # limits of a canvas
MIN_SIDE = 64
MULTI_REFERENCE_AREA = 1024 * 1024  # pixels of each of several references
SHRINKING = 0.995  # by which an image is reduced until its canvas fits


class Canvas(NamedTuple):
    """A reference centered on a larger canvas; sizes are (width, height)."""

    image: Size  # resized image on the canvas
    size: Size

    @property
    def corner(self) -> tuple[int, int]:
        """Return left and top of the image, which is centered on the canvas."""
        return (self.size[0] - self.image[0]) // 2, (self.size[1] - self.image[1]) // 2


def fit_canvas(size: Size, step: int) -> Canvas:
    """Return an image's canvas, with edges rounded up to multiples of `step`, within the limits.

    An image is reduced only if its canvas would have too many pixels or too long a side.
    """
    scale = min(1.0, math.sqrt(MAX_PIXELS / math.prod(size)), MAX_SIDE / max(size))
    while True:
        width, height = (max(1, round(side * scale)) for side in size)
        canvas = _round_side(width, step), _round_side(height, step)
        if math.prod(canvas) <= MAX_PIXELS:
            return Canvas((width, height), canvas)
        scale *= SHRINKING


def _round_side(side: int, step: int) -> int:
    return min(MAX_SIDE, max(MIN_SIDE, round_up(side, step)))


def fit_image_canvas(path: Path, step: int) -> Canvas:
    """Return the canvas on which an image is centered, with edges in multiples of `step`.

    Raises MediaError if the image cannot be read.
    """
    return fit_canvas(image_size(path), step)


def read_on_canvas(path: Path, step: int) -> Tensor:
    """Return a reference on a canvas of whole tokens, 1 1 H W 3 uint8; reflections fill the margins.

    Raises MediaError if it cannot be read.
    """
    frame = read_image(path)
    canvas = fit_canvas((frame.shape[1], frame.shape[0]), step)
    if canvas.image != (frame.shape[1], frame.shape[0]):
        frame = resize_frame(frame, canvas.image, "lanczos")
    left, top = canvas.corner
    right = canvas.size[0] - canvas.image[0] - left
    bottom = canvas.size[1] - canvas.image[1] - top
    # "reflect" does not repeat the edge pixel, so it needs more pixels than an image of one token has
    mode = "reflect" if min(canvas.image) > step else "symmetric"
    frame = np.pad(frame, ((top, bottom), (left, right), (0, 0)), mode=mode)  # type: ignore[call-overload]
    return torch.from_numpy(np.ascontiguousarray(frame)[None, None])


def fit_one_of_several(path: Path, step: int) -> Fit:
    """Return how to downscale and crop a reference image that is one of several.

    Raises MediaError if its size cannot be read.
    """
    return fit_within(image_size(path), MULTI_REFERENCE_AREA, step)


def read_one_of_several(path: Path, step: int) -> Tensor:
    """Read one of several reference images, 1 1 H W 3 uint8, at the size for several."""
    return read_reference(path, MULTI_REFERENCE_AREA, step)
