"""Options of the loss: how a difference between predicted and true velocity counts."""

import argparse
import math
from dataclasses import dataclass

from modules.errors import OptionError

LOSSES = ("l1", "l2", "huber", "smooth_l1")
RAW, ADDITIVE, SIGMA_SCALED = "raw", "additive", "sigma_scaled"
PREDICTIONS = (RAW, ADDITIVE, SIGMA_SCALED)
# by what --weighting_scheme weights the loss: the timestep as a whole number, the exact share of noise
TIMESTEP, SIGMA, NOTHING = "timestep", "sigma", "nothing"
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


@dataclass(frozen=True)
class PredictionOptions:
    """What of a network's output is compared with the velocity. Video models always compare the output."""

    model_prediction_type: str

    @property
    def weighted_by(self) -> str:
        """Return by what --weighting_scheme weights the loss, which it always shapes the draws for."""
        return SIGMA if self.model_prediction_type == SIGMA_SCALED else NOTHING


def add_prediction_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `PredictionOptions`."""
    group = parser.add_argument_group("prediction")
    group.add_argument(
        "--model_prediction_type",
        default=RAW,
        choices=PREDICTIONS,
        help="what is compared with the velocity: raw: the output of the model, as it was trained; additive: "
        "the output plus the noisy latents; sigma_scaled: the noisy latents minus sigma times the output",
    )


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
