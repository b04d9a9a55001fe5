"""Start noise that is changed for some pictures: pyramid noise and noise offset (--pyramid_noise_prob,
--noise_offset_prob).

All numbers come from the picture's own generator, and none is drawn by what is not asked for, so that a
picture depends neither on its batch nor on these options if they are left out.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from stable_diffusion.sampling_options import StartNoiseOptions

LEVELS = 6  # of pyramid noise at most, as in training with it
# each level is smaller than the one before by a factor that is drawn between these
LEAST_STEP, MOST_STEP = 2.0, 4.0


def vary_noise(noise: Tensor, options: StartNoiseOptions, generator: torch.Generator) -> Tensor:
    """Return the start noise of a picture, C h w with a standard deviation of 1, changed or not.

    First pyramid noise with its probability, then the offset with its own.
    """
    if _hits(options.pyramid_noise_prob, generator):
        assert options.pyramid_noise_discount_range is not None
        noise = add_pyramid(noise, _between(options.pyramid_noise_discount_range, generator), generator)
    if _hits(options.noise_offset_prob, generator):
        assert options.noise_offset_range is not None
        noise = add_offset(noise, _between(options.noise_offset_range, generator), generator)
    return noise


def add_offset(noise: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Add one normal number times `amount` to each channel of C h w.

    Source: Guttenberg 2023, "Diffusion with Offset Noise".
    """
    return noise + amount * _draw((len(noise), 1, 1), noise, generator)


def add_pyramid(noise: Tensor, discount: float, generator: torch.Generator) -> Tensor:
    """Add coarser noise to C h w, level i times discount^i, and scale the sum to a standard deviation of 1.

    Source: Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training".
    """
    channels, height, width = noise.shape
    total, level_height, level_width = noise, float(height), float(width)
    for level in range(1, LEVELS + 1):
        step = _between((LEAST_STEP, MOST_STEP), generator)
        level_height, level_width = max(level_height / step, 1.0), max(level_width / step, 1.0)
        coarse = _draw((channels, int(level_height), int(level_width)), noise, generator)
        fine = interpolate(coarse[None], (height, width), mode="bilinear")[0]
        total = total + fine * discount**level
        if min(level_height, level_width) <= 1:
            break
    return total / total.std()


def _hits(probability: float | None, generator: torch.Generator) -> bool:
    return bool(probability) and _between((0.0, 1.0), generator) < (probability or 0)


def _between(limits: tuple[float, ...], generator: torch.Generator) -> float:
    share = torch.rand((), generator=generator, device=generator.device).item()
    return limits[0] + (limits[1] - limits[0]) * share


def _draw(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return drawn.to(like.device, like.dtype)
