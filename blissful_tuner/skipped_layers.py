"""Skip-layer guidance: steer away from what the network makes of the negative text without some blocks.

Source: the released code of Stable Diffusion 3.5, which leaves blocks out of a pass with the positive text;
the known video tools, whose numbers users know, take the negative one.
"""

from torch import Tensor

from blissful_tuner.guidance_options import GuidanceOptions
from blissful_tuner.guidance_passes import POSITIVE, GuidanceStage, Pass, Velocities


def active_steps(options: GuidanceOptions, num_steps: int) -> range:
    """Return the steps, of those that are made, at which layers are skipped; none if it is off."""
    if not options.skipped_layers:
        return range(0)
    return range(int(options.slg_start * num_steps), int(options.slg_end * num_steps))


def add_skipped_layers(weakened: Pass, scale: float) -> GuidanceStage:
    """`--slg_mode original`: add the difference between the positive pass and a weakened negative one.

    weakened: the negative pass without the layers. The other mode, "uncond", is no stage: there the guidance
    takes the weakened pass for the negative one.
    """

    def change(velocity: Tensor, velocities: Velocities) -> Tensor:
        return velocity + scale * (velocities[POSITIVE] - velocities[weakened])

    return GuidanceStage((POSITIVE, weakened), change)
