"""Place a reference image on a white canvas of the clip's size."""

import numpy
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor

from modules.media.pixels import to_pixels
from modules.media.reading import resize_frame

STEP = 8  # pixels per latent


def composite_on_white(frame: NDArray[numpy.uint8], width: int, height: int) -> Tensor:
    """Scale an image, H W 3, to fit inside `width` x `height`, and center it on white: 1 3 1 H W in -1..1.

    As in diffusers' WanVACEPipeline, sides are first reduced to multiples of 8 (Lanczos), then scaled and
    rounded down (bilinear, without antialiasing).
    """
    reduced_height = max(frame.shape[0] // STEP, 1) * STEP
    reduced_width = max(frame.shape[1] // STEP, 1) * STEP
    if (reduced_height, reduced_width) != frame.shape[:2]:
        frame = resize_frame(frame, (reduced_width, reduced_height), "lanczos")
    scale = min(height / reduced_height, width / reduced_width)
    scaled_height = max(int(reduced_height * scale), 1)
    scaled_width = max(int(reduced_width * scale), 1)
    clip = torch.from_numpy(frame[None, None])  # 1 1 H W 3, bytes
    image = to_pixels(clip)[:, :, 0]  # 1 3 H W, -1..1
    scaled = functional.interpolate(
        image, (scaled_height, scaled_width), mode="bilinear", align_corners=False
    )
    canvas = image.new_ones(1, 3, 1, height, width)
    top = (height - scaled_height) // 2
    left = (width - scaled_width) // 2
    canvas[:, :, 0, top : top + scaled_height, left : left + scaled_width] = scaled
    return canvas
