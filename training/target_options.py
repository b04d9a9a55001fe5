"""Options of targets that need no frozen model. Standard library only."""

from modules.options import HABIT, Options, option

MOST_GUIDANCE = 20


class GuidedTargetOptions(Options, title="guided target"):
    """How far the target is moved away from what the network predicts without a prompt."""

    guided_target: float | None = option(
        "learn towards u + SCALE * (v - u), where v is the usual target and u what the network predicts for "
        "the empty prompt: for models that were distilled with guidance. One more pass in each step, without "
        "gradients",
        above=1,
        most=MOST_GUIDANCE,
        metavar="SCALE",
        hint="3 to 4 are usual",
        facts=HABIT,
    )
    guided_target_min_timestep: int = option(
        "noise, in thousandths, below which --guided_target is not used",
        default=0,
        least=0,
        most=1000,
        needs="guided_target",
        hint="0 uses it everywhere",
        facts=HABIT,
    )
    guided_target_sound: float | None = option(
        "SCALE of --guided_target for the sound of clips; default: that of the picture",
        above=1,
        most=MOST_GUIDANCE,
        needs="guided_target",
        hint="3 to 4 are usual",
        facts=HABIT,
    )


NO_GUIDED_TARGET = GuidedTargetOptions.usual()
