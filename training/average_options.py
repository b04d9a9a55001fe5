"""Options of the exponential moving average (EMA) of the trained weights."""

import argparse
from dataclasses import dataclass

from modules.errors import OptionError
from modules.option_values import check_at_least


@dataclass(frozen=True)
class AverageOptions:
    """Options of the average that a run keeps beside its weights."""

    ema_decay: float | None  # per step; None: no average
    ema_update_every: int  # steps
    sample_ema: bool  # samples show the average

    def __post_init__(self) -> None:
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise OptionError(f"--ema_decay {self.ema_decay}: give a number between 0 and 1, such as 0.999")
        check_at_least("--ema_update_every", self.ema_update_every, 1, "1 updates the average at each step")
        if self.sample_ema and self.ema_decay is None:
            raise OptionError("--sample_ema needs an average: give --ema_decay, such as 0.999")


def add_average_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `AverageOptions`."""
    group = parser.add_argument_group("average of the weights (EMA)")
    group.add_argument(
        "--ema_decay",
        type=float,
        help="keep an exponential moving average of the trained weights with this decay per step (0.999) and "
        "save it as OUTPUT_NAME...-ema.safetensors beside each file",
    )
    group.add_argument(
        "--ema_update_every",
        type=int,
        default=1,
        help="update the average every N steps, with the decay of N steps: for a whole model, whose average "
        "lies in host memory",
    )
    group.add_argument("--sample_ema", action="store_true", help="make samples with the average")
