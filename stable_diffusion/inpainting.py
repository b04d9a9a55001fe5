"""Inpainting: what the mask leaves black is put back after each step, as noisy as the rest is then."""
# Letters: B pictures, h w latent size, H W in pixels

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modules.flow.schedule import Schedule
from stable_diffusion.pixels import STRIDE, fit
from stable_diffusion.samplers import DiffusersSampler


def mask_pixels(mask: Image.Image, width: int, height: int) -> Tensor:
    """Return a mask of that size, 1 1 H W: 1 where it is lighter than half grey, which is painted anew; else
    0. So it is in diffusers' pipelines, even with soft edges.
    """
    grey = fit(mask.convert("RGB"), width, height).convert("L")
    values = torch.from_numpy(np.asarray(grey, dtype=np.float32) / 255)
    return (values >= 0.5).float()[None, None]


def mask_latents(mask: Tensor) -> Tensor:
    """Return a mask B 1 H W at the size of latents: B 1 h w, each the upper left pixel of its square."""
    return mask[:, :, ::STRIDE, ::STRIDE]


@dataclass(frozen=True, eq=False)
class Inpainting:
    """A sampler around another one. After each step latents are

        original with noise * (1 - mask) + latents * mask

    and after the last one without noise.
    """

    inner: DiffusersSampler
    original: Tensor  # B 4 h w, scaled as the U-Net sees them
    noise: Tensor  # B 4 h w, the start noise
    mask: Tensor  # B 1 h w; 1 is painted anew

    @property
    def schedule(self) -> Schedule:
        return self.inner.schedule

    @property
    def first(self) -> int:
        return self.inner.first

    def model_input(self, index: int, sample: Tensor) -> Tensor:
        return self.inner.model_input(index, sample)

    def add_noise(self, index: int, latents: Tensor, noise: Tensor) -> Tensor:
        return self.inner.add_noise(index, latents, noise)

    def step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        painted = self.inner.step(index, velocity, sample).squeeze(2)
        kept = self.original
        if index + 1 < self.schedule.num_steps:
            kept = self.inner.add_noise(index + 1, kept, self.noise)
        return ((1 - self.mask) * kept + self.mask * painted).unsqueeze(2)
