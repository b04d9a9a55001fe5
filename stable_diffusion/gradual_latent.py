"""Gradual Latent: denoising begins with small latents, which grow on the way, with the sampler euler_a.

A step that makes them grow resizes what it begins with and what the U-Net says of it; Euler's step and the
fresh noise are those of the new size. An unsharp mask may make up for the blur of resizing. Source: kohya-ss,
"Gradual Latent", 2023; the steps: Karras et al. 2022, arXiv 2206.00364, in the ancestral form of k-diffusion.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from modules.errors import OptionError
from stable_diffusion.contract import AskedPicture
from stable_diffusion.pixels import STRIDE
from stable_diffusion.samplers import MakeStep, SchedulerSolver
from stable_diffusion.shrink_options import GradualLatentOptions, Unsharp
from stable_diffusion.starting import is_masked

logger = logging.getLogger(__name__)

Size = tuple[int, int]  # of latents: height, width
SAMPLERS = ("euler_a", "k_euler_a")
STEP = 8  # sides of latents that are still to grow are multiples of it, for the U-Net's halvings
NEARLY = 1 - 1e-6  # a ratio that is 1 but for the rounding of its sum


def size_at(full: Size, ratio: float) -> Size:
    """Return the size of latents at a ratio of their full size, down to multiples of 8, at least 8."""
    if ratio >= NEARLY:
        return full
    height, width = (max(int(side * ratio) // STEP * STEP, min(STEP, side)) for side in full)
    return height, width


def plan_growth(timesteps: Sequence[float], gradual: GradualLatentOptions) -> dict[int, float]:
    """Return the ratio that steps let the latents grow to, by the place of a step in `timesteps`.

    timesteps: of the steps that are made, falling.
    """
    growth: dict[int, float] = {}
    ratio, last = gradual.gradual_latent_ratio, None
    for index, timestep in enumerate(timesteps):
        is_due = last is None or index - last >= gradual.gradual_latent_every_n_steps
        if timestep < (gradual.gradual_latent_timesteps or 0) and ratio < NEARLY and is_due:
            ratio = min(
                gradual.gradual_latent_ratio + (len(growth) + 1) * gradual.gradual_latent_ratio_step, 1.0
            )
            growth[index], last = ratio, index
    return growth


def begin_small(
    latents: Tensor, sampler: SchedulerSolver, gradual: GradualLatentOptions
) -> tuple[Tensor, SchedulerSolver]:
    """Return the start of denoising, B C 1 h w, in its first size, and the sampler that makes it grow.

    If no step is made, all stays as it is. Raises OptionError if the blur of an unsharp mask is larger than
    the latents.
    """
    if sampler.first >= sampler.schedule.num_steps:
        return latents, sampler
    full, unsharp = _size(latents), gradual.unsharp
    timesteps = sampler.schedule.timesteps[sampler.first :].tolist()
    growth = {sampler.first + index: ratio for index, ratio in plan_growth(timesteps, gradual).items()}
    sizes = [size_at(full, ratio) for ratio in growth.values()]
    if unsharp is not None and sizes and unsharp.ksize // 2 >= min(sizes[0]):
        raise OptionError(
            f"the blur of {unsharp.ksize} of --gradual_latent_unsharp_params (--glus) is too large for "
            f"latents of {sizes[0][1]} x {sizes[0][0]}. Give a smaller one, such as 3"
        )
    first = size_at(full, gradual.gradual_latent_ratio)
    last = sizes[-1] if sizes else first
    if last != full:
        logger.warning(
            "Gradual Latent ends at %d x %d pixels instead of %d x %d: there are too few steps to grow. "
            "Give more --steps, a larger --gradual_latent_ratio_step or a higher "
            "--gradual_latent_timesteps.",
            *(side * STRIDE for side in (*reversed(last), *reversed(full))),
        )
    growing = GrowingSteps(sampler.scheduler, full, growth, unsharp, gradual.gradual_latent_s_noise)
    return resize(latents, first), replace(sampler, around=growing)


def check_batch(pictures: Sequence[AskedPicture], sampler: str) -> None:
    """Raise OptionError if a batch with Gradual Latent cannot be made."""
    if sampler not in SAMPLERS:
        raise OptionError(
            f"{pictures[0].label}: Gradual Latent (--gradual_latent_timesteps, --glt) works with --sampler "
            f"euler_a only, not with {sampler}"
        )
    if any(map(is_masked, pictures)):
        raise OptionError(
            f"{pictures[0].label}: Gradual Latent (--gradual_latent_timesteps, --glt) cannot be used with a "
            "mask: what is kept of the picture has its full size. Leave one out"
        )


@dataclass(frozen=True, eq=False)
class GrowingSteps:
    """Stand around the steps of euler_a, which draws noise in the size of its sample; some enlarge it."""

    scheduler: Any
    full: Size
    growth: Mapping[int, float]  # ratio, by the step's index in the schedule
    unsharp: Unsharp | None
    s_noise: float

    def __call__(self, step: MakeStep, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """Return the next sample, larger if this step makes it grow. velocity: the U-Net's output."""
        if index not in self.growth:
            return step(index, velocity, sample)
        size, unsharp = size_at(self.full, self.growth[index]), self.unsharp
        sample, velocity = resize(sample.float(), size), resize(velocity.float(), size)
        stepped = step(index, velocity, sample)
        if unsharp is None and self.s_noise == 1:
            return stepped
        # all is linear: the derivative of what is resized is the derivative, resized
        change = self._change(index, velocity, sample)
        noise = stepped - (sample + change)
        if unsharp is None:
            moved = sample + change
        elif unsharp.target_x:
            moved = sharpen(sample + change, unsharp)
        else:
            moved = sharpen(sample, unsharp) + change
        return moved + self.s_noise * noise

    def _change(self, index: int, output: Tensor, sample: Tensor) -> Tensor:
        """Return the change of the sample by Euler's step, without noise."""
        scheduler = self.scheduler
        here, there = (float(scheduler.sigmas[place]) for place in (index, index + 1))
        if scheduler.config.prediction_type == "v_prediction":
            # the predicted clean sample is x / (s^2 + 1) - v s / sqrt(s^2 + 1)
            derivative = sample * (here / (here**2 + 1)) + output / (here**2 + 1) ** 0.5
        else:
            derivative = output
        up = there * (max(here**2 - there**2, 0.0) ** 0.5) / here
        down = max(there**2 - up**2, 0.0) ** 0.5
        return derivative * (down - here)


def resize(latents: Tensor, size: Size) -> Tensor:
    """Return latents B C 1 h w in that size, bicubic; as they are if they have it."""
    if _size(latents) == size:
        return latents
    return interpolate(latents.squeeze(2), size, mode="bicubic").unsqueeze(2)


def sharpen(latents: Tensor, unsharp: Unsharp) -> Tensor:
    """Return x + (x - blur(x)) * strength for latents B C 1 h w.

    The blur is Gaussian, of `ksize` by `ksize` latents, which are mirrored at the edges.
    """
    places = torch.arange(unsharp.ksize, dtype=torch.float32) - unsharp.ksize // 2
    row = torch.exp(-0.5 * (places / unsharp.sigma) ** 2)
    row = (row / row.sum()).to(latents.device, latents.dtype)
    images = latents.squeeze(2)
    channels, edge = images.shape[1], unsharp.ksize // 2
    kernel = torch.outer(row, row).expand(channels, 1, -1, -1)
    blurred = conv2d(pad(images, (edge,) * 4, mode="reflect"), kernel, groups=channels)
    return (images + (images - blurred) * unsharp.strength).unsqueeze(2)


def _size(latents: Tensor) -> Size:
    height, width = latents.shape[-2:]
    return height, width
