"""Options of guidance besides its scale: classifier-free, and of attention. Standard library only."""

import logging

from modules.errors import OptionError
from modules.options import Options, option

MOST_NAG = 100  # of some hundreds the products overflow in float16


NAG = "normalised attention guidance (NAG)"


class NagOptions(Options, title=NAG):
    """Options of normalised attention guidance, which steers attention away from --nag_prompt."""

    nag_scale: float | None = option(
        "steer attention away from --nag_prompt, with or without --guidance_scale; 4 to 11 are usual, 1 "
        "turns it off",
        least=1,
        most=MOST_NAG,
        hint="1 is off, 4 to 11 are usual",
    )
    nag_tau: float = option(
        "how many times as large --nag_scale may make what a token sees; more is scaled back",
        default=3.5,
        above=0,
        hint="2.5 to 5 are usual",
    )
    nag_alpha: float = option(
        "share of the steered attention in the result, 0 to 1", default=0.5, least=0, most=1, hint="0 is off"
    )

    @property
    def is_on(self) -> bool:
        """Whether attention is steered; scale 1 and alpha 0 would change nothing and are not computed."""
        return self.nag_scale not in (None, 1) and self.nag_alpha != 0


NO_NAG = NagOptions()


logger = logging.getLogger(__name__)

MOST_SCALE = 1000  # of guidance, and of every other factor here
CFG_SKIP_MODES = ("early", "late", "middle", "early_late", "alternate", "none")


class GuidanceOptions(Options, title="guidance"):
    """Options of classifier-free guidance besides its scale."""

    nag: NagOptions
    cfg_skip_mode: str = option(
        "steps that run without guidance, to save time", default="none", choices=CFG_SKIP_MODES
    )
    cfg_apply_ratio: float | None = option(
        "with --cfg_skip_mode: share of the steps that keep guidance, 0 to 1", least=0, most=1
    )
    slg_mode: str | None = option(
        "skip-layer guidance: original adds a third pass that skips the layers, uncond skips them in the "
        "negative pass",
        choices=("original", "uncond"),
    )
    slg_layers: str | None = option("numbers of the blocks to skip, e.g. 9,10")
    slg_scale: float = option(
        "strength of --slg_mode original", default=3.0, least=-MOST_SCALE, most=MOST_SCALE, hint="3 is usual"
    )
    slg_start: float = option("share of the steps at which it begins", default=0.0, least=0, most=1)
    slg_end: float = option("share of the steps at which it ends", default=0.3, least=0, most=1)
    cfgzerostar_scaling: bool = option(
        "CFG-Zero*: scale the negative prediction to fit the positive one; no further pass"
    )
    cfgzerostar_init_steps: int = option(
        "CFG-Zero*: number of first steps whose prediction is multiplied by --cfgzerostar_multiplier; 2 for "
        "text-to-video and 1 for image-to-video are usual, -1 is none",
        default=-1,
        least=-1,
        hint="1 or 2 are usual, -1 turns it off",
    )
    cfgzerostar_multiplier: float = option(
        "with --cfgzerostar_init_steps: the factor; 0 skips the passes of these steps",
        default=0.0,
        least=-MOST_SCALE,
        most=MOST_SCALE,
        hint="0 is usual",
    )
    perp_neg: float | None = option(
        "perpendicular negative guidance: weight of what the negative prompt does not share with the prompt; "
        "1.5 to 2 are usual; one further pass, of the empty prompt",
        least=-MOST_SCALE,
        most=MOST_SCALE,
        excludes="cfgzerostar_scaling",
        hint="1.5 to 2 are usual; it replaces the formula of guidance",
    )
    guidance_rescale: float = option(
        "share of the deviation added by guidance that is undone, 0 to 1: against pictures that are too "
        "strong",
        default=0.0,
        least=0,
        most=1,
    )
    disable_embedded_for_cfg: bool = option(
        "at steps with guidance, call the model without its embedded guidance"
    )

    def __post_init__(self) -> None:
        if self.cfg_skip_mode != "none" and self.cfg_apply_ratio is None:
            raise OptionError(
                f"--cfg_skip_mode {self.cfg_skip_mode} needs --cfg_apply_ratio: the share of the steps with "
                "guidance"
            )
        if self.cfg_apply_ratio is not None and self.cfg_skip_mode == "none":
            logger.warning("--cfg_apply_ratio is ignored because --cfg_skip_mode is none")
        if (self.slg_mode is None) != (self.slg_layers is None):
            given, missing = (
                ("--slg_mode", "--slg_layers") if self.slg_layers is None else ("--slg_layers", "--slg_mode")
            )
            logger.warning("%s is ignored because %s is not given", given, missing)
        if self.slg_mode is not None:
            parse_layers(self.slg_layers)
        if self.cfgzerostar_multiplier != 0 and self.cfgzerostar_init_steps < 1:
            logger.warning(
                "--cfgzerostar_multiplier %g is ignored because --cfgzerostar_init_steps is not given",
                self.cfgzerostar_multiplier,
            )
        if self.perp_neg is not None and self.slg_mode == "original" and self.skipped_layers:
            raise OptionError(
                "--perp_neg and --slg_mode original cannot be used together. Use --slg_mode uncond, or leave "
                "one of them out"
            )

    @property
    def skipped_layers(self) -> frozenset[int]:
        """The blocks that skip-layer guidance leaves out; none if it is off."""
        return frozenset() if self.slg_mode is None else parse_layers(self.slg_layers)

    @property
    def scaled_steps(self) -> int:
        """How many of the first steps have their velocity scaled, so that it predicts no clean clip."""
        return max(self.cfgzerostar_init_steps, 0) if self.cfgzerostar_multiplier != 1 else 0


def parse_layers(text: str | None) -> frozenset[int]:
    """Read --slg_layers, as "9,10". Raises OptionError for other words."""
    try:
        layers = frozenset(int(part) for part in (text or "").split(",") if part.strip())
    except ValueError:
        raise OptionError(
            f"--slg_layers {text!r}: give block numbers separated by commas, such as 9,10"
        ) from None
    if any(layer < 0 for layer in layers):
        raise OptionError(f"--slg_layers {text!r}: blocks are counted from 0")
    return layers


# for training samples: guidance at every step, nothing else
PLAIN_GUIDANCE = GuidanceOptions.usual()
