"""Options of the loss: how a difference between predicted and true velocity counts."""

import argparse
import math
from dataclasses import dataclass

from modules.errors import OptionError

LOSSES = ("l1", "l2", "huber", "smooth_l1")
SCHEDULES = ("constant", "exponential", "snr")
WITH_THRESHOLD = ("huber", "smooth_l1")


@dataclass(frozen=True)
class LossOptions:
    """The loss of one element, and the threshold above which Huber losses grow linearly."""

    loss_type: str
    huber_schedule: str
    huber_c: float
    huber_scale: float

    def __post_init__(self) -> None:
        for option, value in {"--huber_c": self.huber_c, "--huber_scale": self.huber_scale}.items():
            if not (math.isfinite(value) and value > 0):
                raise OptionError(f"{option} {value:g}: give a number above 0")

    @property
    def has_threshold(self) -> bool:
        """Whether the loss is one of Huber's."""
        return self.loss_type in WITH_THRESHOLD


L2 = LossOptions("l2", "snr", 0.1, 1.0)


def add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `LossOptions`."""
    group = parser.add_argument_group("loss")
    group.add_argument(
        "--loss_type",
        default="l2",
        choices=LOSSES,
        help="l2: squared error; l1: absolute error; huber, smooth_l1: squared below a threshold, else "
        "absolute",
    )
    group.add_argument(
        "--huber_schedule",
        default="snr",
        choices=SCHEDULES,
        help="threshold of huber and smooth_l1: constant, or smaller the more noise there is",
    )
    group.add_argument(
        "--huber_c", type=float, default=0.1, help="threshold of huber and smooth_l1 in pure noise"
    )
    group.add_argument(
        "--huber_scale", type=float, default=1.0, help="factor on the thresholds of constant and exponential"
    )
