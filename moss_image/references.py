"""Images to edit: their sizes for the text encoder. Source: ai-toolkit's format (`model_kwargs.edit`)."""

import math
from pathlib import Path

import torch
from torch import Tensor

from modules.media.buckets import Size
from modules.media.reading import read_image, resize_cover, resize_frame

SHOWN_PIXELS = 384 * 384  # maximum size of an image for the text encoder


def shrink(image: Tensor) -> Tensor:
    """Reduce an image, H W 3 uint8, to at most `SHOWN_PIXELS` with Lanczos; never enlarge it."""
    frame = image[..., :3].numpy()
    height, width = frame.shape[:2]
    scale = math.sqrt(SHOWN_PIXELS / (width * height))
    if scale >= 1:
        return torch.from_numpy(frame)
    size = max(1, int(width * scale)), max(1, int(height * scale))
    return torch.from_numpy(resize_frame(frame, size, "lanczos"))


def read_encoder_image(path: Path, size: Size | None = None) -> Tensor:
    """Read an image as the text encoder sees it, H W 3 uint8, resized and cropped to `size`.

    Raises MediaError if it cannot be read.
    """
    frame = read_image(path)
    return shrink(torch.from_numpy(frame if size is None else resize_cover(frame, size)))
