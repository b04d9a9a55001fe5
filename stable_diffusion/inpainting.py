"""Further inputs of U-Nets for inpainting: a mask, and latents of the image without the marked area."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modules.errors import OptionError
from modules.media.reading import read_mask
from modules.paths import explain_missing
from modules.seeds import derive_seed
from protocols.data import LatentSpec
from protocols.inputs import IMAGE
from protocols.requests import Prepared, Request, check_opens
from protocols.rules import RequestSource
from stable_diffusion.starting import mask_pixels, read_picture, to_pixels

# in conditions, B 5 1 h w: the mask (1 is repainted), and latents of the image without what it marks
INPAINTING = "inpainting"
MASK_PATH = "mask_path"  # in `Request.extra`
_OPTIONS = "--i2i_path; in lines of samples --img or --ci"
MASK_AREA = 0.2  # fraction of the image that a randomly drawn mask covers
NUM_CORNERS = 128
NUM_WAVES = 4
WOBBLE = 0.5


def make_inputs(
    vae: Any, pixels: Tensor, mask: Tensor, generator: torch.Generator, latent: LatentSpec
) -> Tensor:
    """Return the U-Net's additional inputs for an image, mask and masked latents: 5 1 h w on the CPU.

    Args:
        vae: The loaded VAE, a `DiffusersVae`.
        pixels: The image, 1 3 H W in -1..1.
        mask: H W float; 1 where the image is repainted, else 0.
        generator: Draws the sample of the posterior.
        latent: The latent space.
    """
    latents = vae.encode_pixels(pixels * (1 - mask), [generator])[0].cpu()  # hidden pixels become gray, 0
    _, rows, columns = latent.stride
    # nearest: the upper left pixel of each latent; the U-Net never sees a soft mask
    small = mask[None, None, ::rows, ::columns]
    return torch.cat([small, latents * latent.scale])


def set_image_to_repaint(
    request: Request, remove_unusable_media: Callable[[Request, str], Request], model_title: str
) -> Request:
    """Set a request's `image_path` to the image to repaint, and remove media that the model cannot use.

    The image is the source of image-to-image, else the input image, else the first control image.

    Args:
        request: The request.
        remove_unusable_media: Removes all media that image models do not take.
        model_title: Name of the model, for messages.

    Raises:
        OptionError: If the image or the mask cannot be read, or if there is a mask without an image.
    """
    image = request.image_path
    control_images = request.control_images
    if image is None and control_images:
        image = control_images[0]
        control_images = control_images[1:]
    if request.source is not None and request.source.option == IMAGE:
        image = request.source.path
    other_media = replace(request, image_path=None, control_images=control_images)
    usable = remove_unusable_media(other_media, model_title)
    if image is not None:
        _check_image("the image to repaint", image)
    mask = request.extra.get(MASK_PATH)
    if mask is not None:
        if image is None:
            raise OptionError(
                f"the mask {mask} needs the image that is repainted where the mask is white ({_OPTIONS})"
            )
        _check_image("the mask", Path(mask))
    return replace(usable, image_path=image)


def _check_image(label: str, path: Path) -> None:
    if not path.is_file():
        raise OptionError(f"{label}: there is no file {path}.{explain_missing(path)} Correct the path")
    check_opens(label, path, is_image=True)


def find_kept_source(request: Request) -> RequestSource | None:
    """Return the request's source; None for an image at full denoising strength, which is pure noise."""
    source = request.source
    return None if source is not None and source.option == IMAGE and source.denoise == 1 else source


def read_image_and_mask(prepared: Prepared) -> tuple[Tensor, Tensor]:
    """Return the image to repaint, 1 3 H W in -1..1, and its mask, H W, with 1 where it is repainted.

    Without an image, everything is repainted; without a mask, a wavy ellipse drawn with the seed.
    """
    width, height = prepared.width, prepared.height
    path, mask = prepared.request.image_path, prepared.request.extra.get(MASK_PATH)
    if path is None:
        return torch.zeros(1, 3, height, width), torch.ones(height, width)
    pixels = to_pixels(read_picture(path), width, height)
    if mask is not None:
        return pixels, mask_pixels(Image.fromarray(read_mask(Path(mask))), width, height)[0, 0]
    rng = random.Random(derive_seed("mask of a sample", prepared.seed))
    return pixels, torch.from_numpy(draw_wobbly_ellipse(height, width, rng)).float()


def _sum_waves(waves: Sequence[tuple[float, float]], angle: float) -> float:
    """Sum the waves that form the ellipse's edge, at an angle."""
    values = [amplitude * math.cos(k * angle + phase) for k, (amplitude, phase) in enumerate(waves, 1)]
    return sum(values)


def _rotate(x: float, y: float, angle: float) -> tuple[float, float]:
    cosine, sine = math.cos(angle), math.sin(angle)
    return x * cosine - y * sine, x * sine + y * cosine


def draw_wobbly_ellipse(height: int, width: int, rng: random.Random) -> Any:
    """Draw an ellipse with a wavy edge near the middle of an image, H W bool."""
    # its area, pi * horizontal_radius * vertical_radius, is the fraction MASK_AREA of the image
    aspect_ratio = rng.uniform(0.6, 1.4)
    horizontal_radius = math.sqrt(MASK_AREA * height * width / math.pi * aspect_ratio)
    vertical_radius = horizontal_radius / aspect_ratio
    center_x = width * rng.uniform(0.25, 0.75)
    center_y = height * rng.uniform(0.25, 0.75)
    rotation = rng.uniform(0, 2 * math.pi)
    # amplitude and phase of each wave of the edge; wave k has k periods around the ellipse
    waves = [(rng.uniform(-1, 1), rng.uniform(0, 2 * math.pi)) for _ in range(NUM_WAVES)]
    corners = []
    for corner in range(NUM_CORNERS):
        angle = 2 * math.pi * corner / NUM_CORNERS
        radius = 1 + WOBBLE * _sum_waves(waves, angle) / NUM_WAVES
        x = radius * horizontal_radius * math.cos(angle)
        y = radius * vertical_radius * math.sin(angle)
        rotated_x, rotated_y = _rotate(x, y, rotation)
        corners.append((center_x + rotated_x, center_y + rotated_y))
    mask = np.zeros((height, width), np.uint8)
    points: Any = np.rint(np.array([corners])).astype(np.int32)
    cv2.fillPoly(mask, points, 1)
    return mask.astype(bool)
