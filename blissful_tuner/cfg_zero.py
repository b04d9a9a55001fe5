"""CFG-Zero*: guidance that also holds while the network's prediction is still poor, in the first steps.

Source: Fan et al. 2025, arXiv 2503.18886.
"""

from torch import Tensor

from blissful_tuner.guidance_options import GuidanceOptions
from blissful_tuner.guidance_passes import POSITIVE, GuidanceStage, Pass, Velocities


def cfg_zero(scale: float, negative: Pass) -> GuidanceStage:
    """`--cfgzerostar_scaling`: guidance with the negative velocity scaled to where it is nearest to the
    positive one. Each sample by itself.
    """

    def change(_: Tensor, velocities: Velocities) -> Tensor:
        positive, without = velocities[POSITIVE], velocities[negative]
        axes = tuple(range(1, positive.ndim))
        fit = (positive * without).sum(axes, keepdim=True) / (
            without.square().sum(axes, keepdim=True) + 1e-8  # as in the released code
        )
        without = fit * without
        return without + scale * (positive - without)

    return GuidanceStage((POSITIVE, negative), change)


def init_factor(options: GuidanceOptions, step: int) -> float:
    """Return what the velocity of a step is multiplied by. step: from 0, of those that are made."""
    return options.cfgzerostar_multiplier if step < options.cfgzerostar_init_steps else 1.0
