"""Control images of networks that take them as pixels: in caches, batches, samples and conditions."""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from modules.control_codes import shorten
from modules.errors import CacheError, DatasetError, OptionError
from modules.media.random_masks import draw_mask
from modules.media.reading import read_image, read_mask, resize_frame
from modules.option_values import format_shape
from protocols.data import (
    CONTROL_PIXELS,
    CONTROL_STRENGTH,
    Batch,
    CacheEntry,
    Conditions,
    MediaBatch,
    MediaTable,
    send_tensor,
)
from protocols.requests import Prepared, Request, check_opens

logger = logging.getLogger(__name__)

# options in a line of sample prompts
CONTROL = "--cn"
MASK = "--mk"
MASK_PATH = "mask_path"  # key of the mask in a line of prompts
CONTROL_MASK = "control_mask"  # key in conditions: B 1 H W uint8, 1 where the image is repainted


def check_controls(table: MediaTable, network_name: str) -> MediaTable:
    """Check that a table has control images; return it without them, for checks that accept none.

    `network_name` names the network that takes the control images.

    Raises:
        DatasetError: If the table has no control images.
    """
    if not table.has_control:
        raise DatasetError(
            f"{table.name}: {network_name} learns from pairs of an image and its control image, and the "
            "table has no control images. Set conditioning_data_dir, a folder of images with the same "
            "names."
        )
    return replace(table, has_control=False)


def add_controls(entries: Sequence[Sequence[CacheEntry]], media: MediaBatch) -> list[list[CacheEntry]]:
    """Add control images to cache entries; they are cropped and mirrored like their images.

    Raises:
        DatasetError: If an image has several control images.
    """
    if len(media.control) > 1:
        raise DatasetError(
            f"{media.table.name}: {len(media.control)} control images for one image. Leave one for each image"
        )
    rgb_controls = rearrange(media.control[0][..., :3], "b 1 h w c -> b c h w")
    with_controls = []
    for (entry,), control in zip(entries, rgb_controls, strict=True):  # an image has a single entry
        tensors = {**entry.tensors, CONTROL_PIXELS: control.clone()}
        with_controls.append([replace(entry, tensors=tensors)])
    return with_controls


def make_control_conditions(
    batch: Batch, latents: Tensor, stride: int, network_name: str
) -> dict[str, Tensor]:
    """Return the control images of a batch, B 3 H W uint8, as conditions.

    Args:
        batch: The batch.
        latents: Its latents, B C F h w.
        stride: Number of pixels along a side of a latent pixel.
        network_name: Name of the network that takes the control images, for messages.

    Raises:
        CacheError: If control images are missing or differ in size from their images.
    """
    batch.check({CONTROL_PIXELS: "conditioning_data_dir in the subsets"}, network_name)
    controls = batch.tensor(CONTROL_PIXELS)
    image_size = tuple(stride * length for length in latents.shape[-2:])
    if controls.dtype != torch.uint8 or tuple(controls.shape[-2:]) != image_size:
        raise CacheError(
            f"{batch.keys[0]}: its control image has {format_shape(controls.shape[-2:])} rows and columns, "
            f"the image {format_shape(image_size)}. Cache latents again."
        )
    return {CONTROL_PIXELS: controls}


def check_control(option: str, path: Path) -> None:
    """Raise OptionError if the control image given by `option` cannot be read."""
    if not path.is_file():
        raise OptionError(f"{option} {path}: no such image. Correct the path")
    check_opens(option.removeprefix("--"), path, is_image=True)


def sample_controls(prepared: Prepared) -> dict[str, Tensor]:
    """Return a sample's control image as conditions; {} if it has none.

    The image is preprocessed like the guide images of gen_img.py.
    """
    request = prepared.request
    if request.control_path is None:
        return {}
    strength = float(request.extra.get("control_multiplier", 1))
    return read_control(request.control_path, prepared.width, prepared.height, strength)


def read_control(path: Path, width: int, height: int, strength: float) -> dict[str, Tensor]:
    """Return conditions: the control image, resized, 1 3 H W uint8, and its strength, 1 value."""
    frame = read_image(path)
    if frame.shape[:2] != (height, width):
        frame = resize_frame(frame, (width, height), "lanczos")
    pixels = rearrange(torch.from_numpy(frame.copy()), "h w c -> 1 c h w")
    return {CONTROL_PIXELS: pixels, CONTROL_STRENGTH: torch.tensor([strength])}


def read_control_mask(path: Path, width: int, height: int) -> dict[str, Tensor]:
    """Return conditions: the mask, resized, 1 1 H W uint8, which is 1 where it is at least half gray.

    Raises:
        MediaError: If the mask cannot be read.
    """
    frame = read_mask(path)
    if frame.shape[:2] != (height, width):
        frame = resize_frame(frame, (width, height), "nearest")
    is_generated = torch.from_numpy(frame[:, :, 0] >= 128)  # H W; a mask has equal channels
    return {CONTROL_MASK: is_generated[None, None].to(torch.uint8)}


def draw_control_mask(width: int, height: int, seed: int) -> dict[str, Tensor]:
    """Return a random mask for a sample without one, as conditions: 1 1 H W uint8, 0 or 1."""
    drawn = draw_mask(height, width, random.Random(seed))
    return {CONTROL_MASK: torch.from_numpy(drawn[None, None]).to(torch.uint8)}


def mask_in(cond: Conditions, device: torch.device) -> Tensor | None:
    """Return the conditions' masks, B 1 H W float32; None without masks."""
    return send_tensor(cond, CONTROL_MASK, device).float() if CONTROL_MASK in cond else None


def control_in(cond: Conditions, device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """Return the control images in the conditions, B 3 H W in 0..1, and their strength; or None and 0."""
    if CONTROL_PIXELS not in cond:
        return None, 0.0
    pixels = send_tensor(cond, CONTROL_PIXELS, device)
    return (pixels.float() / 255).to(dtype), strength_in(cond)


def strength_in(cond: Conditions) -> float:
    """Return the strength of the control images in the conditions; 1 by default."""
    strength: Any = cond.get(CONTROL_STRENGTH)
    return 1.0 if strength is None else float(strength[0])


def keep_control(
    request: Request, keep_media: Callable[[Request, str], Request], model_name: str, takes_control: bool
) -> Request:
    """Return a request without unusable media, but with its control image if a network takes it.

    Logs a warning if a network takes a control image and the request has none.

    Args:
        request: The request.
        keep_media: Removes all media that the model does not take: `ImageModelFamily.keep_media`.
        model_name: Name of the model, for messages.
        takes_control: Whether a network takes a control image.

    Raises:
        OptionError: If the control image cannot be read.
    """
    control = request.control_path
    if not takes_control:
        return keep_media(request, model_name)
    if control is None:
        logger.warning(
            "%r has no control image (--cn): it is generated without control", shorten(request.prompt, 60)
        )
        return keep_media(request, model_name)
    check_control(CONTROL, control)
    # the model itself takes no control image, so the image is taken out before this check, and put back
    without_control = replace(request, control_path=None)
    return replace(keep_media(without_control, model_name), control_path=control)
