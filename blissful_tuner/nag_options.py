"""Options of normalised attention guidance. Standard library only."""

import argparse
from dataclasses import dataclass

from modules.errors import OptionError

MOST_SCALE = 100  # of some hundreds the products overflow in float16


@dataclass(frozen=True)
class NagOptions:
    """Options of normalised attention guidance, which steers attention away from --nag_prompt."""

    nag_scale: float | None  # None, 1: off
    nag_tau: float
    nag_alpha: float

    def __post_init__(self) -> None:
        if self.nag_scale is not None and not 1 <= self.nag_scale <= MOST_SCALE:
            raise OptionError(
                f"--nag_scale {self.nag_scale:g}: give a number from 1 (off) to {MOST_SCALE}; 4 to 11 are "
                "usual"
            )
        if not self.nag_tau > 0:
            raise OptionError(f"--nag_tau {self.nag_tau:g}: give a number above 0; 2.5 to 5 are usual")
        if not 0 <= self.nag_alpha <= 1:
            raise OptionError(f"--nag_alpha {self.nag_alpha:g}: give a share from 0 (off) to 1")

    @property
    def is_on(self) -> bool:
        """Whether attention is steered; scale 1 and alpha 0 would change nothing and are not computed."""
        return self.nag_scale not in (None, 1) and self.nag_alpha != 0


NO_NAG = NagOptions(None, 3.5, 0.5)


def add_nag_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `NagOptions`, and --nag_prompt of each video."""
    group = parser.add_argument_group("normalised attention guidance (NAG)")
    group.add_argument(
        "--nag_scale",
        type=float,
        default=None,
        help="steer attention away from --nag_prompt, with or without --guidance_scale; 4 to 11 are usual, 1 "
        "turns it off",
    )
    group.add_argument(
        "--nag_tau",
        type=float,
        default=3.5,
        help="how many times as large --nag_scale may make what a token sees; more is scaled back",
    )
    group.add_argument(
        "--nag_alpha", type=float, default=0.5, help="share of the steered attention in the result, 0 to 1"
    )
    group.add_argument(
        "--nag_prompt", type=str, default=None, help="what to steer away from; default: the negative prompt"
    )
