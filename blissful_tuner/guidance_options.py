"""Options of guidance beside its scale. Standard library only."""

import argparse
import logging
from dataclasses import dataclass

from blissful_tuner.nag_options import NO_NAG, NagOptions, add_nag_arguments
from modules.errors import OptionError
from modules.options import add_unsupported

logger = logging.getLogger(__name__)

MOST_SCALE = 1000  # of guidance
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
    nag: NagOptions

    def __post_init__(self) -> None:
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
        for option, share in (("--slg_start", self.slg_start), ("--slg_end", self.slg_end)):
            if not 0 <= share <= 1:
                raise OptionError(f"{option} {share}: give a share of the steps from 0 to 1")
        if not abs(self.slg_scale) <= MOST_SCALE:
            raise OptionError(
                f"--slg_scale {self.slg_scale}: give a number from -{MOST_SCALE} to {MOST_SCALE}; 3 is usual"
            )
        if not 0 <= self.guidance_rescale <= 1:  # nan too
            raise OptionError(f"--guidance_rescale {self.guidance_rescale}: give a share from 0 to 1")
        if (self.slg_mode is None) != (self.slg_layers is None):
            given, missing = (
                ("--slg_mode", "--slg_layers") if self.slg_layers is None else ("--slg_layers", "--slg_mode")
            )
            logger.warning("%s is ignored because %s is not given", given, missing)
        if self.slg_mode is not None:
            parse_layers(self.slg_layers)

    @property
    def skipped_layers(self) -> frozenset[int]:
        """The blocks that skip-layer guidance leaves out; none if it is off."""
        return frozenset() if self.slg_mode is None else parse_layers(self.slg_layers)


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
PLAIN_GUIDANCE = GuidanceOptions("none", None, None, None, 3.0, 0.0, 0.3, 0.0, NO_NAG)


def add_guidance_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `GuidanceOptions` and --cfg_schedule; refuse guidance that is not supported yet.

    Scripts that have --guidance_rescale also call `add_rescale_argument`.
    """
    parser.set_defaults(guidance_rescale=0.0)
    add_nag_arguments(parser)
    group = parser.add_argument_group("guidance")
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
    group.add_argument(
        "--slg_mode",
        type=str,
        default=None,
        choices=["original", "uncond"],
        help="skip-layer guidance: original adds a third pass that skips the layers, uncond skips them in "
        "the "
        "negative pass",
    )
    group.add_argument(
        "--slg_layers", type=str, default=None, help="numbers of the blocks to skip, e.g. 9,10"
    )
    group.add_argument("--slg_scale", type=float, default=3.0, help="strength of --slg_mode original")
    group.add_argument("--slg_start", type=float, default=0.0, help="share of the steps at which it begins")
    group.add_argument("--slg_end", type=float, default=0.3, help="share of the steps at which it ends")
    later = "use --guidance_scale, --cfg_schedule or skip-layer guidance"
    add_unsupported(
        group, "--cfgzerostar_scaling", action="store_true", reason=later, help="CFG-Zero* scaling"
    )
    add_unsupported(
        group,
        "--cfgzerostar_init_steps",
        type=int,
        default=-1,
        reason=later,
        help="CFG-Zero* zero initialisation",
    )
    add_unsupported(
        group, "--perp_neg", type=float, default=None, reason=later, help="perpendicular negative guidance"
    )


def add_rescale_argument(group: argparse._ArgumentGroup) -> None:
    """Declare --guidance_rescale, which not all scripts have."""
    text = (
        "share of the deviation added by guidance that is undone, 0 to 1: against pictures that are too "
        "strong"
    )
    group.add_argument("--guidance_rescale", type=float, default=0.0, help=text)
