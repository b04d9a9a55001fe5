"""Options of classifier-free guidance besides its scale. Standard library only."""

import argparse
import logging
from dataclasses import dataclass

from blissful_tuner.nag_options import NO_NAG, NagOptions, add_nag_arguments
from modules.errors import OptionError

logger = logging.getLogger(__name__)

MOST_SCALE = 1000  # of guidance, and of every other factor here
CFG_SKIP_MODES = ("early", "late", "middle", "early_late", "alternate", "none")


@dataclass(frozen=True)
class GuidanceOptions:
    """Options of classifier-free guidance besides its scale."""

    cfg_skip_mode: str  # which steps run without guidance; "none": all run with it
    cfg_apply_ratio: float | None  # share of the steps that keep guidance
    slg_mode: str | None  # skip-layer guidance: original, uncond
    slg_layers: str | None  # block numbers, "9,10"
    slg_scale: float
    slg_start: float  # shares of the steps
    slg_end: float
    guidance_rescale: float  # share of the deviation added by guidance that is taken back
    cfgzerostar_scaling: bool  # scale the negative velocity to where it is nearest to the positive one
    cfgzerostar_init_steps: int  # the first steps, whose velocity is multiplied; -1 or 0: none
    cfgzerostar_multiplier: float  # by this
    perp_neg: float | None  # weight of what the negative prompt has across the positive one
    disable_embedded_for_cfg: bool  # no embedded guidance at steps with guidance
    nag: NagOptions

    def __post_init__(self) -> None:
        self._check_steps()
        self._check_layers()
        self._check_zero_star()
        self._check_perp_neg()
        if not 0 <= self.guidance_rescale <= 1:  # nan too
            raise OptionError(f"--guidance_rescale {self.guidance_rescale}: give a share from 0 to 1")

    def _check_steps(self) -> None:
        if self.cfg_skip_mode != "none" and self.cfg_apply_ratio is None:
            raise OptionError(
                f"--cfg_skip_mode {self.cfg_skip_mode} needs --cfg_apply_ratio: the share of the steps with "
                "guidance"
            )
        if self.cfg_apply_ratio is not None and not 0 <= self.cfg_apply_ratio <= 1:
            raise OptionError(
                f"--cfg_apply_ratio {self.cfg_apply_ratio}: give a share of the steps from 0 to 1"
            )
        if self.cfg_apply_ratio is not None and self.cfg_skip_mode == "none":
            logger.warning("--cfg_apply_ratio is ignored because --cfg_skip_mode is none")

    def _check_layers(self) -> None:
        for option, share in (("--slg_start", self.slg_start), ("--slg_end", self.slg_end)):
            if not 0 <= share <= 1:
                raise OptionError(f"{option} {share}: give a share of the steps from 0 to 1")
        if not abs(self.slg_scale) <= MOST_SCALE:
            raise OptionError(
                f"--slg_scale {self.slg_scale}: give a number from -{MOST_SCALE} to {MOST_SCALE}; 3 is usual"
            )
        if (self.slg_mode is None) != (self.slg_layers is None):
            given, missing = (
                ("--slg_mode", "--slg_layers") if self.slg_layers is None else ("--slg_layers", "--slg_mode")
            )
            logger.warning("%s is ignored because %s is not given", given, missing)
        if self.slg_mode is not None:
            parse_layers(self.slg_layers)

    def _check_zero_star(self) -> None:
        if self.cfgzerostar_init_steps < -1:
            raise OptionError(
                f"--cfgzerostar_init_steps {self.cfgzerostar_init_steps}: give a number of steps; 1 or 2 are "
                "usual, -1 turns it off"
            )
        if not abs(self.cfgzerostar_multiplier) <= MOST_SCALE:  # nan too
            raise OptionError(
                f"--cfgzerostar_multiplier {self.cfgzerostar_multiplier:g}: give a number from -{MOST_SCALE} "
                f"to {MOST_SCALE}; 0 is usual"
            )
        if self.cfgzerostar_multiplier != 0 and self.cfgzerostar_init_steps < 1:
            logger.warning(
                "--cfgzerostar_multiplier %g is ignored because --cfgzerostar_init_steps is not given",
                self.cfgzerostar_multiplier,
            )

    def _check_perp_neg(self) -> None:
        if self.perp_neg is None:
            return
        if not abs(self.perp_neg) <= MOST_SCALE:  # nan too
            most = MOST_SCALE
            raise OptionError(
                f"--perp_neg {self.perp_neg:g}: give a number from -{most} to {most}; 1.5 to 2 are usual"
            )
        if self.cfgzerostar_scaling:
            raise OptionError(
                "--cfgzerostar_scaling and --perp_neg both replace the formula of guidance: give one of them"
            )
        if self.slg_mode == "original" and self.skipped_layers:
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
    """Read --slg_layers, as "9,10". Raises OptionError for what are no block numbers."""
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
PLAIN_GUIDANCE = GuidanceOptions(
    cfg_skip_mode="none",
    cfg_apply_ratio=None,
    slg_mode=None,
    slg_layers=None,
    slg_scale=3.0,
    slg_start=0.0,
    slg_end=0.3,
    guidance_rescale=0.0,
    cfgzerostar_scaling=False,
    cfgzerostar_init_steps=-1,
    cfgzerostar_multiplier=0.0,
    perp_neg=None,
    disable_embedded_for_cfg=False,
    nag=NO_NAG,
)


def add_guidance_arguments(parser: argparse.ArgumentParser, has_embedded: bool = False) -> None:
    """Declare the options of `GuidanceOptions` and --cfg_schedule.

    has_embedded: whether the script has embedded guidance, which --disable_embedded_for_cfg is about.
    """
    add_nag_arguments(parser)
    group = parser.add_argument_group("guidance")
    _add_steps(group)
    _add_layers(group)
    _add_formulas(group)
    if has_embedded:
        group.add_argument(
            "--disable_embedded_for_cfg",
            action="store_true",
            help="at steps with guidance, call the model without its embedded guidance",
        )
    else:
        parser.set_defaults(disable_embedded_for_cfg=False)


def _add_steps(group: argparse._ArgumentGroup) -> None:
    """Declare the options that say which steps have guidance."""
    group.add_argument(
        "--cfg_schedule",
        type=str,
        default=None,
        help="steps with guidance, counted from 1: numbers, ranges, every n-th, with their own scale, or "
        "excluded, e.g. '1-10, e~3:6.5, !7'",
    )
    group.add_argument(
        "--cfg_skip_mode",
        type=str,
        default="none",
        choices=CFG_SKIP_MODES,
        help="steps that run without guidance, to save time",
    )
    group.add_argument(
        "--cfg_apply_ratio",
        type=float,
        default=None,
        help="with --cfg_skip_mode: share of the steps that keep guidance, 0 to 1",
    )


def _add_layers(group: argparse._ArgumentGroup) -> None:
    """Declare the options of skip-layer guidance."""
    group.add_argument(
        "--slg_mode",
        type=str,
        default=None,
        choices=["original", "uncond"],
        help="skip-layer guidance: original adds a third pass that skips the layers, uncond skips them in "
        "the negative pass",
    )
    group.add_argument(
        "--slg_layers", type=str, default=None, help="numbers of the blocks to skip, e.g. 9,10"
    )
    group.add_argument("--slg_scale", type=float, default=3.0, help="strength of --slg_mode original")
    group.add_argument("--slg_start", type=float, default=0.0, help="share of the steps at which it begins")
    group.add_argument("--slg_end", type=float, default=0.3, help="share of the steps at which it ends")


def _add_formulas(group: argparse._ArgumentGroup) -> None:
    """Declare the options that change how the velocities of the passes become one."""
    group.add_argument(
        "--cfgzerostar_scaling",
        action="store_true",
        help="CFG-Zero*: scale the negative prediction to fit the positive one; no further pass",
    )
    group.add_argument(
        "--cfgzerostar_init_steps",
        type=int,
        default=-1,
        help="CFG-Zero*: number of first steps whose prediction is multiplied by --cfgzerostar_multiplier; "
        "2 for text-to-video and 1 for image-to-video are usual, -1 is none",
    )
    group.add_argument(
        "--cfgzerostar_multiplier",
        type=float,
        default=0.0,
        help="with --cfgzerostar_init_steps: the factor; 0 skips the passes of these steps",
    )
    group.add_argument(
        "--perp_neg",
        type=float,
        default=None,
        help="perpendicular negative guidance: weight of what the negative prompt does not share with the "
        "prompt; 1.5 to 2 are usual; one further pass, of the empty prompt",
    )
    group.add_argument(
        "--guidance_rescale",
        type=float,
        default=0.0,
        help="share of the deviation added by guidance that is undone, 0 to 1: against pictures that are too "
        "strong",
    )
