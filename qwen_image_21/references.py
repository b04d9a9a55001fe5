"""Images to edit: their sizes and colors, for the VAE and for the text encoder.

Both get one image of the same size, because the tokens of the text encoder's vision tower and the latents
have to match: about a megapixel in the image's own shape, or the size of the result. Source: the released
pipeline.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encoders.pictures import show_references
from modules.errors import MediaError
from modules.media.buckets import Size
from modules.media.reading import image_size, read_image, resize_cover, resize_frame
from protocols.requests import Prepared
from protocols.steps import EditReference
from qwen_image.options import MASK
from qwen_image.references import (
    MEGAPIXEL,
    OFFICIAL_STEP,
    check_equal_size,
    check_mask,
    official_size,
    read_mask,
)
from qwen_image_21.options import QwenImage21ReferenceOptions

WHITE = 255


def read_reference(path: Path, target: Size | None = None) -> Tensor:
    """Read an image for the model, H W 3 uint8, or H W 4 if it has transparency.

    It covers the size `target` and is cropped; without `target` it is stretched to its official size. Raises
    MediaError if it cannot be read, or is too small.
    """
    frame = read_image(path, alpha=True)
    height, width = frame.shape[:2]
    if min(width, height) < OFFICIAL_STEP:
        raise MediaError(f"{path} has {width}x{height} pixels, each side needs at least {OFFICIAL_STEP}")
    if target is not None:
        return torch.from_numpy(resize_cover(frame, target).copy())
    size = official_size((width, height), MEGAPIXEL)
    return torch.from_numpy(resize_frame(frame, size, "none" if size == (width, height) else "lanczos"))


def lay_on_white(image: Tensor) -> Tensor:
    """Composite an image, H W 3 or H W 4 uint8, onto white: H W 3 uint8, rounded as in Pillow."""
    if image.shape[-1] == 3:
        return image
    rgba = Image.fromarray(image.numpy(), "RGBA")
    white = Image.new("RGB", rgba.size, (WHITE, WHITE, WHITE))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return torch.from_numpy(np.array(white))


def read_encoder_image(path: Path, target: Size | None = None) -> Tensor:
    """Read an image as the text encoder sees it: like `read_reference`, but on a white background."""
    return lay_on_white(read_reference(path, target))


def add_reference_images(prepared: Prepared, options: QwenImage21ReferenceOptions) -> Prepared:
    """Add the request's reference images to all prompts, and check its mask.

    Raises OptionError if there are too many, if the result cannot be anchored to the first one, or if the
    mask cannot be read.
    """
    paths = prepared.request.control_images
    mask = prepared.request.extra.get(MASK)
    if mask is not None:
        check_mask(Path(mask), bool(paths))
    if not paths:
        return prepared
    target = (prepared.width, prepared.height) if options.resize_control_to_image_size else None
    metadata = dict(prepared.extra_metadata)
    if mask is not None:
        size = official_size(image_size(paths[0]), MEGAPIXEL) if target is None else target
        check_equal_size(f"--{MASK} {mask}", paths[0], size, prepared)
        metadata[MASK] = Path(mask).name
    return replace(show_references(prepared, target), extra_metadata=metadata)


def read_edit_reference(prepared: Prepared, latents: Tensor) -> EditReference | None:
    """Return the record that resets the result to the first image outside the mask; None without a mask.

    `latents` are the first image's, 1 C 1 h w.
    """
    mask = prepared.request.extra.get(MASK)
    if mask is None:
        return None
    step = prepared.width // latents.shape[-1]
    return EditReference(latents, read_mask(Path(mask), (prepared.width, prepared.height), step))
