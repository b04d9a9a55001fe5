"""A feature of training: `--gradient_noise 0.1` adds noise to the gradients before they are clipped.

Source: Neelakantan et al. 2015, arXiv 1511.06807.
"""

from functools import partial

from reelsmith.modules.errors import OptionError
from reelsmith.modules.options import HABIT, option
from reelsmith.training.features.contract import AT_WEIGHTS, Feature, FeatureOptions
from reelsmith.training.features.phases import GRADIENTS


class GradientNoiseOptions(FeatureOptions, title="gradient noise", at=AT_WEIGHTS, facts=HABIT):
    """Strength of the noise."""

    gradient_noise: float | None = option("add noise of this deviation to the gradients", minimum=0)


def add_noise(options, run, step):
    import torch  # not for --help
    from reelsmith.training.data.feed import seed_generator

    generator = seed_generator(run.progress.seed, "gradient noise", run.progress.step)
    for parameter in step.parameters:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad += options.gradient_noise * noise.to(parameter.grad)


def join(run, options):
    if run.options.is_fused:
        raise OptionError("--gradient_noise with --fused_backward_pass: gradients are freed at once. Omit it")
    run.info.in_files["gradient_noise"] = options.gradient_noise
    run.after(GRADIENTS, partial(add_noise, options))


GRADIENT_NOISE = Feature(
    "gradient_noise",
    GradientNoiseOptions,
    is_on=lambda options: options.gradient_noise is not None,
    join=join,
)
