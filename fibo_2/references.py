"""Images to edit: their sizes for network and text encoder, and the part that a mask generates anew.

Source: diffusers' BriaFibo2ImageProcessor, which prepares them as in training.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fibo_2.options import MASK
from modules.errors import OptionError
from modules.media.buckets import Fit, Size
from modules.media.reading import Frame, fit_frame, image_size, read_image
from protocols.requests import check_opens

STEP = 16  # sides are multiples of this, in pixels
MIN_SIDE = 64
AREA = 1024 * 1024  # area of the sizes in training, within 10 percent
SHOWN_SIDE = 768  # maximum size of an image for the text encoder
GRAY = 128  # pixel value of the part to repaint, and the threshold of the mask
PRECISION = 9  # digits of the share that is cropped


def nearest_trained_size(size: Size) -> Size:
    """Return the trained size (width, height) to which an image of this aspect ratio is cropped least.

    Ties go to the size nearest to a megapixel, then to the widest.
    """
    aspect = size[0] / size[1]
    sizes = []
    for width in range(MIN_SIDE, 2 * AREA // MIN_SIDE, STEP):
        # areas between 0.9 and 1.1 of the trained area
        first = max(MIN_SIDE, math.ceil(0.9 * AREA / width / STEP) * STEP)
        last = min(2 * AREA // width, int(1.1 * AREA / width))
        sizes += [(width, height) for height in range(first, last + 1, STEP)]

    def rank(candidate: Size) -> tuple[float, int, int]:
        ratio = candidate[0] / candidate[1] / aspect
        cropped = 1 - min(ratio, 1 / ratio)
        return round(cropped, PRECISION), abs(candidate[0] * candidate[1] - AREA), -candidate[0]

    return min(sizes, key=rank)


def crop_cover(frame: Frame, size: Size) -> Frame:
    """Return a frame, H W 3, scaled with Lanczos to cover `size` and cropped around its center."""
    height, width = frame.shape[:2]
    scale = max(size[1] / height, size[0] / width)
    resized = math.ceil(width * scale), math.ceil(height * scale)
    crop = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    return fit_frame(frame, Fit(resized, crop, size, "lanczos"))


def shrink(image: Tensor) -> Tensor:
    """Reduce an image, H W C uint8, for the text encoder: H W 3, edges of at most `SHOWN_SIDE` pixels."""
    pil_image = Image.fromarray(image[..., :3].numpy())
    pil_image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return torch.from_numpy(np.array(pil_image))


def read_edited(path: Path, size: Size | None) -> Tensor:
    """Read an image to edit, H W 3 uint8, scaled and cropped to `size`.

    None selects the size in training that is nearest to the image's. Raises MediaError if it cannot be read.
    """
    frame = read_image(path)
    return torch.from_numpy(
        crop_cover(frame, size or nearest_trained_size((frame.shape[1], frame.shape[0]))).copy()
    )


def read_encoder_image(path: Path, size: Size | None) -> Tensor:
    """Read an image to edit as the text encoder sees it, H W 3 uint8: cropped to `size`, then downscaled.

    Raises MediaError if it cannot be read.
    """
    return shrink(read_edited(path, size))


def read_own_size(path: Path) -> Tensor:
    """Read an image to edit in its own size, H W 3 uint8, cropped to multiples of `STEP`.

    Raises:
        MediaError: If the image cannot be read.
    """
    return torch.from_numpy(_crop_own(read_image(path)))


def _crop_own(frame: Frame) -> Frame:
    height, width = frame.shape[:2]
    return frame[: height // STEP * STEP, : width // STEP * STEP].copy()


def read_masked(path: Path, mask: Path, size: Size | None) -> Tensor:
    """Read an image to edit, H W 3 uint8 of `size`, painted gray where the mask is lighter than gray.

    None for `size` keeps its own, cropped to multiples of `STEP`.

    Raises:
        OptionError: If the mask cannot be read or has another size.
        MediaError: If the image cannot be read.
    """
    check_opens(MASK, mask, is_image=True)
    frame = read_image(path)
    is_masked = np.asarray(Image.fromarray(read_image(mask)).convert("L")) >= GRAY  # lighter than middle gray
    if is_masked.shape != frame.shape[:2]:
        (height, width), (rows, columns) = frame.shape[:2], is_masked.shape
        raise OptionError(
            f"--{MASK} {mask}: {columns} x {rows} pixels, but {path} has {width} x {height}. Pass a mask "
            "of the image's size"
        )
    painted = np.where(is_masked[..., None], np.uint8(GRAY), frame)
    return torch.from_numpy(_crop_own(painted) if size is None else crop_cover(painted, size).copy())


def find_size(path: Path) -> Size:
    """Return the size of an edit's result, the trained size nearest to the first image.

    Raises MediaError if it cannot be read.
    """
    return nearest_trained_size(image_size(path))
