"""What denoising begins with: noise, a picture with noise, or a picture whose masked part is made anew.

A picture's generator is drawn from in the order of diffusers' pipelines: the posterior of its input picture,
the start noise, the posterior of what the mask leaves of the input; then come the steps.
"""
# Letters: B pictures, h w latent size, H W in pixels

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.errors import OptionError
from stable_diffusion.contract import AskedPicture, Model, SecondStart
from stable_diffusion.inpainting import Inpainting, mask_latents, mask_pixels
from stable_diffusion.pixels import encode_pixels, latent_size, read_picture, to_pixels
from stable_diffusion.prompt_options import PictureInputOptions
from stable_diffusion.samplers import DiffusersSampler, SchedulerSolver
from stable_diffusion.sampling_options import StartNoiseOptions
from stable_diffusion.start_noise import vary_noise

CHANNELS = 4  # of latents


@dataclass(frozen=True, eq=False)
class Beginning:
    """Where the loop begins, and the sampler that it follows."""

    latents: Tensor  # B 4 1 h w, float32, as the sampler wants them at its first step
    sampler: DiffusersSampler
    beside: Tensor | None = None  # see `UnetPasses`


def generators_of(pictures: Sequence[AskedPicture]) -> list[torch.Generator]:
    """Return each picture's generator. All are on the CPU: their numbers are the same on every device."""
    return [torch.Generator().manual_seed(picture.seed) for picture in pictures]


def is_masked(picture: AskedPicture) -> bool:
    """Whether a picture is inpainted. A mask of a prompt with several parts shows their regions instead."""
    return picture.mask is not None and picture.settings.parts == 1


def strength_of(picture: AskedPicture, start: SecondStart | None) -> float | None:
    """Return the share of the steps that are made of a picture; None: all, from noise."""
    return None if picture.image is None and start is None else picture.settings.strength


def check_painting(unet: Mapping[str, Any], checkpoint: Path, options: PictureInputOptions) -> None:
    """Raise OptionError if an inpainting checkpoint is not given what it paints.

    unet: the configuration of its U-Net.
    """
    if unet["in_channels"] == 9 and (options.image_path is None or options.mask_path is None):
        raise OptionError(
            f"--ckpt {checkpoint} is an inpainting checkpoint, which needs --image_path and --mask_path. "
            "Give both, or another checkpoint"
        )


def check_start(model: Model, picture: AskedPicture, start: SecondStart | None) -> None:
    """Raise OptionError if a picture cannot begin as it says."""
    if is_masked(picture) and picture.image is None and start is None:
        raise OptionError(
            f"{picture.label}: the mask {picture.mask} needs --image_path, the picture that is repainted "
            "where it is white"
        )
    if model.is_inpainting and not is_masked(picture):
        raise OptionError(
            f"{picture.label}: {model.path} is an inpainting checkpoint, which needs a picture and its "
            "mask, and knows no regions of a prompt's parts. Take another checkpoint, or leave out AND"
        )


def begin(
    model: Model,
    pictures: Sequence[AskedPicture],
    start: SecondStart | None,
    sampler: SchedulerSolver,
    noise_options: StartNoiseOptions,
) -> Beginning:
    """Encode what the pictures start from, draw their start noise and blend both.

    pictures: all with an input picture or none, all with a mask or none. start: as many entries as pictures.
    Raises MediaError if an input picture or a mask cannot be read.
    """
    settings = pictures[0].settings
    generators, device = sampler.generators, model.device

    def noise() -> Tensor:
        shape = (CHANNELS, *latent_size(settings))
        drawn = [vary_noise(torch.randn(shape, generator=each), noise_options, each) for each in generators]
        return torch.stack(drawn).to(device)

    if strength_of(pictures[0], start) is None:
        return Beginning((noise() * sampler.noise_level).unsqueeze(2), sampler)
    is_painted = is_masked(pictures[0])
    # the first step of inpainting at full strength is noise alone
    from_noise = is_painted and settings.strength == 1
    pixels = None if start is not None and start.images is None else _pixels(pictures, start)
    clean: Tensor | None = None
    if pixels is None:
        assert start is not None
        assert start.latents is not None
        clean = start.latents.to(device, torch.float32)
    elif not (from_noise and model.is_inpainting):
        clean = encode_pixels(model, pixels, generators)
    drawn = noise()
    is_over = sampler.first >= sampler.schedule.num_steps
    if clean is None or from_noise:
        latents = drawn * sampler.noise_level
    else:
        latents = clean if is_over else sampler.add_noise(sampler.first, clean, drawn)
    if not is_painted:
        return Beginning(latents.unsqueeze(2), sampler)

    masks = torch.cat([_mask(picture) for picture in pictures])
    small = mask_latents(masks).to(device)
    # drawn whether the U-Net sees it or not, as in diffusers' pipeline: the steps' noise comes after it
    left = None if pixels is None else encode_pixels(model, pixels * (1 - masks), generators)
    if model.is_inpainting:
        assert left is not None
        return Beginning(latents.unsqueeze(2), sampler, torch.cat([small, left], dim=1))
    assert clean is not None
    return Beginning(latents.unsqueeze(2), Inpainting(sampler, clean, drawn, small))


def _pixels(pictures: Sequence[AskedPicture], start: SecondStart | None) -> Tensor:
    """Return the pixels of what the pictures start from, B 3 H W."""
    settings = pictures[0].settings
    if start is not None:
        assert start.images is not None
        images = list(start.images)
    else:
        images = [read_picture(picture.image) for picture in pictures if picture.image is not None]
    return torch.cat([to_pixels(image, settings.width, settings.height) for image in images])


def _mask(picture: AskedPicture) -> Tensor:
    assert picture.mask is not None
    return mask_pixels(read_picture(picture.mask), picture.settings.width, picture.settings.height)
