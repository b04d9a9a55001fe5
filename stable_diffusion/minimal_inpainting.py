"""Repaint an image with the options of inpainting_minimal_inference.py, with the networks of gen_img.py."""

import logging
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from modules.media.reading import read_mask
from modules.run_limits import temporary_folder
from stable_diffusion.asking import SEEDS_END
from stable_diffusion.assembling import assemble
from stable_diffusion.inpainting import draw_wobbly_ellipse
from stable_diffusion.making import ImageGenerator
from stable_diffusion.minimal_options import InpaintingImageOptions, MinimalInpaintingOptions, gen_img_argv
from stable_diffusion.options import GenImgOptions, read_gen_img
from stable_diffusion.run import generate

logger = logging.getLogger(__name__)


def repaint(options: MinimalInpaintingOptions) -> None:
    """Repaint the masked (white) area of an image and save the result.

    Raises:
        UserError: If a file is unusable.
    """
    image = options.picture
    seed = random.randrange(SEEDS_END) if image.seed is None else image.seed
    with temporary_folder() as folder:
        mask = folder / "mask.png"
        make_mask(image, seed).save(mask)
        generate(read_gen_img(None, gen_img_argv(options, mask, seed)), load_for_inpainting)


def load_for_inpainting(options: GenImgOptions, device: torch.device) -> ImageGenerator:
    """Load a model for inpainting; pixels outside the mask stay unchanged in its results."""
    return replace(assemble(options, device), restores_unmasked=True)


def make_mask(image: InpaintingImageOptions, seed: int) -> Image.Image:
    """Return the mask at the size of the result: read from a file, or a wavy ellipse drawn with the seed."""
    height, width = image.size
    if image.mask is not None:
        return resize_mask(image.mask, height, width)
    logger.info("--mask is not given: seed %d draws a wavy ellipse that is repainted", seed)
    drawn = draw_wobbly_ellipse(height, width, random.Random(seed))
    return Image.fromarray(drawn.astype(np.uint8) * 255)


def resize_mask(path: Path, height: int, width: int) -> Image.Image:
    """Read a mask file and resize it with nearest-neighbor sampling."""
    return Image.fromarray(read_mask(path)).resize((width, height), Image.Resampling.NEAREST)
