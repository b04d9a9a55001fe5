"""A reference picture on a white canvas of its clip's size."""

import numpy
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor

from modules.media.pixels import to_pixels
from modules.media.reading import resize_frame

STEP = 8  # pixels, of a latent


def on_white(frame: NDArray[numpy.uint8], width: int, height: int) -> Tensor:
    """Scale an image, H W 3, to fit inside `width` x `height`, and center it on white: 1 3 1 H W in -1..1.

    As in diffusers' WanVACEPipeline, sides are first reduced to multiples of 8 (Lanczos), then scaled and
    rounded down (bilinear, without antialiasing).
    """
    rows, columns = (max(side // STEP, 1) * STEP for side in frame.shape[:2])
    if (rows, columns) != frame.shape[:2]:
        frame = resize_frame(frame, (columns, rows), "lanczos")
    scale = min(height / rows, width / columns)
    rows, columns = (max(int(side * scale), 1) for side in (rows, columns))
    image = to_pixels(torch.from_numpy(frame[None, None]))[:, :, 0]
    scaled = functional.interpolate(image, (rows, columns), mode="bilinear", align_corners=False)
    canvas = image.new_ones(1, 3, 1, height, width)
    top = (height - rows) // 2
    left = (width - columns) // 2
    canvas[:, :, 0, top : top + rows, left : left + columns] = scaled
    return canvas
