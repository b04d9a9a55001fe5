"""The steps of HiDream-O1-Image-Dev: fixed noise levels, and fresh noise at each of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.flow.schedule import TRAIN_TIMESTEPS, Schedule, noisy_source
from modules.flow.solvers import Lcm
from protocols.family import NoiseSource

# as distilled: the maker's inference code
TIMES = (
    *(999, 987, 974, 960, 945, 929, 913, 895, 877, 857, 836, 814, 790, 764),
    *(737, 707, 675, 640, 602, 560, 515, 464, 409, 347, 278, 199, 110, 8),
)
NOISE_LIMIT = 2.5  # of its own standard deviations


def select_levels(steps: int) -> tuple[float, ...]:
    """Return the noise levels of all or some of the fixed times, evenly chosen from the first on, then 0.

    `steps` is at most the number of times.
    """
    chosen = [TIMES[index * len(TIMES) // steps] for index in range(steps)]
    return (*(time / TRAIN_TIMESTEPS for time in chosen), 0.0)


def limit_noise(noise: Tensor) -> Tensor:
    """Limit noise to 2.5 times the standard deviation of each sample, B ..."""
    limits = NOISE_LIMIT * noise.flatten(1).std(dim=1).view(-1, *([1] * (noise.ndim - 1)))
    return torch.minimum(torch.maximum(noise, -limits), limits)


def vary_noise(noise: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
    """Return the noise of a training batch as Dev was trained with it: limited."""
    del latents, generator
    return limit_noise(noise)


@dataclass(frozen=True)
class FlashSolver:
    """Jump to the predicted image, and add fresh limited noise for the next level (`Section.solver`)."""

    noise_source: NoiseSource
    noise: Tensor  # of the start, B 3 1 H W in model space
    first_step: int  # above 0 if there is a source image
    schedule: Schedule

    def begin(self, clean: Tensor) -> tuple[Tensor, int]:
        """Return the noisy source image, and the index of its step."""
        return noisy_source(clean, self.noise, self.schedule, self.first_step), self.first_step

    def clean(self, sigma: float, noisy: Tensor, output: Tensor) -> Tensor:
        """Return the clean image that a velocity predicts."""
        return noisy - sigma * output

    def step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """Return the next noisy image, or after the last step the clean one."""
        return Lcm(self.schedule, self._draw).step(index, velocity, sample)

    def _draw(self, shape: Sequence[int]) -> Tensor:
        return limit_noise(self.noise_source.draw(shape))
