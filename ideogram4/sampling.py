"""Noise levels of Ideogram 4's images, as its sampler presets set them. Standard library only.

Source: diffusers' `pipeline_ideogram4.py` and the presets of the release.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

from ideogram4.options import DEFAULT, QUALITY, TURBO

REFERENCE_AREA = 512 * 512  # pixels of an image whose mean is that of the preset
# limits of the logarithm of the signal-to-noise ratio, halved: of the last step before clean, of the first
LEAST_NOISE, MOST_NOISE = 7.5, 9.0


@dataclass(frozen=True)
class SamplerPreset:
    """Number of steps, and the distribution over which their noise levels are spread."""

    steps: int
    final_steps: int  # number of last steps with weaker guidance
    mean: float  # of the noise levels' logits, at REFERENCE_AREA
    std: float


SAMPLERS = {
    QUALITY: SamplerPreset(48, final_steps=3, mean=0.0, std=1.5),
    DEFAULT: SamplerPreset(20, final_steps=2, mean=0.0, std=1.75),
    TURBO: SamplerPreset(12, final_steps=1, mean=0.5, std=1.75),
}


def find_mean(preset: SamplerPreset, width: int, height: int) -> float:
    """Return the mean of the noise levels' logits for an image of a size in pixels."""
    return preset.mean + 0.5 * math.log(width * height / REFERENCE_AREA)


def make_levels(steps: int, mean: float, std: float, first: float | None = None) -> tuple[float, ...]:
    """Return the noise levels of all steps, falling, and 0.

    They are evenly spaced quantiles of a normal distribution, through the logistic function.

    Args:
        steps: Number of steps.
        mean: Mean of the logits.
        std: Standard deviation of the logits.
        first: Replaces the first level; None keeps it.
    """
    normal = NormalDist()
    logits = [MOST_NOISE]
    for step in range(1, steps):
        logit = mean + std * normal.inv_cdf(1 - step / steps)
        logits.append(min(max(logit, -LEAST_NOISE), MOST_NOISE))
    levels = [1 / (1 + math.exp(-logit)) for logit in logits]
    if first is not None:
        levels[0] = first
    return (*levels, 0.0)
