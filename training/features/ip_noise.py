"""Add noise to the input that the model is not trained to predict: --ip_noise_gamma.

Source: Ning et al. 2023, arXiv 2301.11706.
"""

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from modules.options import HABIT, IN_IMAGE_FILES, option
from training.features.contract import AT_NOISE, Feature, FeatureOptions
from training.features.hooks import RunFeatures

if TYPE_CHECKING:
    import torch


class IpNoiseOptions(FeatureOptions, title="noise", at=AT_NOISE, facts={**HABIT, **IN_IMAGE_FILES}):
    """Strength of the noise that is added to the noisy latents (input perturbation)."""

    ip_noise_gamma: float | None = option(
        "input perturbation: mix in this fraction of additional noise, which the model does not have "
        "to predict; 0.1 is common (arXiv 2301.11706)",
        minimum=0,
        maximum=10,
        hint="0.1 is usual",
    )
    ip_noise_gamma_random_strength: bool = option(
        "draw the fraction for each sample, from 0 to --ip_noise_gamma", needs="ip_noise_gamma"
    )


def draw_perturbation(options: IpNoiseOptions, shape: "torch.Size", seed: int, number: int) -> "torch.Tensor":
    """Draw the input perturbation of a micro-batch: noise that is added to the input, but not to the target.

    Args:
        options: Options of the run.
        shape: Shape of the noise.
        seed: Seed of the run.
        number: Index of the micro-batch in the run.
    """
    import torch  # not needed for --help

    from training.data.feed import seed_generator

    assert options.ip_noise_gamma is not None  # the feature is on
    generator = seed_generator(seed, "input perturbation", number)
    perturbation = options.ip_noise_gamma * torch.randn(shape, generator=generator)
    if options.ip_noise_gamma_random_strength:  # one factor for each sample
        perturbation *= torch.rand((shape[0], *([1] * (len(shape) - 1))), generator=generator)
    return perturbation


def _join(run: RunFeatures, options: IpNoiseOptions) -> None:
    run.info.in_files |= asdict(options)
    run.on.noise.append(partial(draw_perturbation, options))


IP_NOISE = Feature(
    name="ip_noise",
    options=IpNoiseOptions,
    is_on=lambda options: bool(options.ip_noise_gamma),
    join=_join,
)
