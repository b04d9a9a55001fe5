"""A feature of training: `--glow 0.1` adds a constant to the noise."""

from functools import partial

from reelsmith.modules.options import HABIT, option
from reelsmith.training.features.contract import AT_NOISE, Feature, FeatureOptions


class GlowOptions(FeatureOptions, title="glow", at=AT_NOISE, facts=HABIT):
    """How much the noise is shifted."""

    glow: float | None = option("add this to the noise", minimum=-1, maximum=1, hint="0.1 is much")


def draw_glow(options, shape, seed, number):
    import torch  # not for --help

    return torch.full(shape, options.glow)


def join(run, options):
    run.info.in_files["glow"] = options.glow
    run.on.noise.append(partial(draw_glow, options))


GLOW = Feature("glow", GlowOptions, is_on=lambda options: options.glow is not None, join=join)
