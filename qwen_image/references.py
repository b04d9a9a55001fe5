"""Images to edit: their sizes for the VAE and for the text encoder, and what of the first one is kept."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

from encoders.pictures import show_references
from modules.errors import MediaError, OptionError
from modules.media.buckets import Size
from modules.media.reading import add_alpha, image_size, read_image, resize_cover, resize_frame
from modules.option_values import to_path
from modules.paths import explain_missing
from protocols.requests import Prepared, Request, check_opens
from protocols.rules import ConsistencyRules
from protocols.steps import EditReference
from qwen_image.options import MASK, QwenImageReferenceOptions

logger = logging.getLogger(__name__)

# pixels of an image as the VAE and, from Edit-2509 on, the text encoder got it in training, with sides that
# are multiples of OFFICIAL_STEP. Source: the released pipelines
MEGAPIXEL, SHOWN_AREA = 1024 * 1024, 384 * 384
OFFICIAL_STEP = 32
STEP = 16  # images that keep their size are cropped to multiples of this
AS_TRAINED = QwenImageReferenceOptions(resize_control_to_official_size=True)


def official_size(size: Size, area: int) -> Size:
    """Return a size of about `area` pixels with the aspect ratio of `size`, in multiples of OFFICIAL_STEP."""
    shape = size[0] / size[1]
    width = math.sqrt(area * shape)
    height = width / shape
    return (
        max(round(width / OFFICIAL_STEP), 1) * OFFICIAL_STEP,
        max(round(height / OFFICIAL_STEP), 1) * OFFICIAL_STEP,
    )


def reference_size(size: Size, area: int | None, target: Size | None = None) -> Size:
    """Return the size (width, height) in which the model sees an image.

    It is `target` if given, else the official size of `area` pixels, else the image's own size, rounded down
    to multiples of STEP.
    """
    if target is not None:
        return target
    if area is not None:
        return official_size(size, area)
    return size[0] // STEP * STEP, size[1] // STEP * STEP


def read_reference(
    path: Path, target: Size | None = None, *, area: int | None = None, has_alpha: bool = False
) -> Tensor:
    """Read an image and resize or crop it for the model: H W 3 uint8, or H W 4 with alpha.

    Args:
        path: The image file.
        target: Size to cover; the rest is cropped.
        area: Without `target`, stretch the image to the model's size for its aspect ratio, of about this many
            pixels. None keeps the size, cropped at the right and bottom to multiples of STEP.
        has_alpha: Return four channels.

    Raises:
        MediaError: If the image cannot be read, or nothing would be left.
    """
    frame = add_alpha(read_image(path, alpha=True)) if has_alpha else read_image(path)
    height, width = frame.shape[:2]
    if min(width, height) < STEP:
        raise MediaError(f"{path} has {width}x{height} pixels, each side needs at least {STEP}")
    size = reference_size((width, height), area, target)
    if target is not None:
        frame = resize_cover(frame, target)
    elif area is not None:
        frame = resize_frame(frame, size, "none" if size == (width, height) else "lanczos")
    return torch.from_numpy(frame[: size[1], : size[0]].copy())


def find_area(options: QwenImageReferenceOptions) -> int | None:
    """Return the official pixel count of an image for the VAE; None if the image keeps its size."""
    return MEGAPIXEL if options.resize_control_to_official_size else None


def fill_size(request: Request) -> Request:
    """Fill in a missing size: about a megapixel, in the aspect ratio of the last control image."""
    if request.width is not None or request.height is not None or not request.control_images:
        return request
    try:
        width, height = official_size(image_size(request.control_images[-1]), MEGAPIXEL)
    except MediaError:  # which says so when the images are checked
        return request
    return replace(request, width=width, height=height)


def _find_preserving_option(mask: str | None, options: QwenImageReferenceOptions) -> str | None:
    """Return the option that preserves parts of the first image: a mask or --rcm_threshold."""
    # None for neither.
    if mask is None:
        return None if options.rcm_threshold is None else "--rcm_threshold"
    if options.rcm_threshold is not None:
        raise OptionError(f"--{MASK} {mask} (in a prompt line): omit --rcm_threshold, which excludes it")
    return f"--{MASK} {mask}"


def add_reference_images(prepared: Prepared, options: QwenImageReferenceOptions) -> Prepared:
    """Add the request's control images to all prompts and, if asked, the first one's name to file names.

    A mask or --rcm_threshold preserves parts of the first image. Raises OptionError if both are given, if the
    first image then differs in size from the result, or if the mask cannot be read.
    """
    paths = prepared.request.control_images
    mask = prepared.request.extra.get(MASK)
    preserving_option = _find_preserving_option(mask, options)
    if mask is not None:
        check_mask(to_path(f"--{MASK}", mask), bool(paths))
    if not paths:
        return prepared
    # None: references keep their own sizes
    target = (prepared.width, prepared.height) if options.resize_control_to_image_size else None
    if preserving_option is not None:
        size = reference_size(image_size(paths[0]), find_area(options), target)
        check_equal_size(preserving_option, paths[0], size, prepared)
    metadata = dict(prepared.extra_metadata)
    if mask is not None:
        metadata[MASK] = Path(mask).name
    name_suffix = f"_{paths[0].stem}" if options.append_original_name else ""
    return replace(show_references(prepared, target), extra_metadata=metadata, output_suffix=name_suffix)


def check_equal_size(option: str, path: Path, size: Size, prepared: Prepared) -> None:
    """Raise OptionError if an image is not used in the size of the result, which `option` requires."""
    width, height = size
    if size != (prepared.width, prepared.height):
        raise OptionError(
            f"{option}: {path} is read with {width} x {height} pixels, but the result has "
            f"{prepared.width} x {prepared.height}: they must be equal. Pass --image_size {height} "
            f"{width}, or --resize_control_to_image_size"
        )


def check_mask(path: Path, has_image: bool) -> None:
    """Raise OptionError if a mask has no image to edit, or if its file is missing or cannot be opened."""
    if not has_image:
        raise OptionError(
            f"--{MASK} {path}: there is no image to keep. Pass one to --control_image_path "
            "(--ci in a prompt line)"
        )
    if not path.is_file():
        raise OptionError(f"--{MASK} {path}: no such file.{explain_missing(path)} Correct the path")
    check_opens(MASK, path, is_image=True)


def read_edit_reference(
    prepared: Prepared, latents: Tensor, options: QwenImageReferenceOptions
) -> EditReference | None:
    """Return the first control image with the rule for resetting unchanged parts of the result to it.

    The rule is --mask_path or --rcm_threshold; None without either. `latents` are the image's, 1 C 1 h w.
    """
    mask = prepared.request.extra.get(MASK)
    threshold = options.rcm_threshold
    if mask is not None:
        step = prepared.width // latents.shape[-1]  # pixels of a latent along an edge
        path = to_path(f"--{MASK}", mask)
        return EditReference(latents, read_mask(path, (prepared.width, prepared.height), step))
    if threshold is None:
        return None
    rules = ConsistencyRules(
        threshold,
        is_relative=options.rcm_relative_threshold,
        kernel_size=options.rcm_kernel_size,
        dilate_size=options.rcm_dilate_size,
        save_masks=options.rcm_debug_save,
    )
    return EditReference(latents, rules=rules)


def read_mask(path: Path, size: Size, latent_step: int) -> Tensor:
    """Read a mask of the region to change, 1 1 1 h w float32: 1 where the file is white, else 0.

    The mask is stretched to `size`, the image's width and height. Raises MediaError if it cannot be read.
    """
    frame = resize_frame(read_image(path), size, "lanczos")
    gray = torch.from_numpy(frame.copy()).float().mean(-1)
    is_white = (gray >= 127.5).float()[None, None]
    latent_size = size[1] // latent_step, size[0] // latent_step
    return functional.interpolate(is_white, latent_size)[:, :, None]
