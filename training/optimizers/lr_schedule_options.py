"""Options of the learning-rate schedule."""

import argparse
from dataclasses import dataclass
from typing import Any

from modules.command import did_you_mean
from modules.errors import OptionError
from modules.option_values import check_at_least, check_below, int_or_float, read_literals

CURVES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "piecewise_constant",
)
ADAFACTOR = "adafactor"  # or "adafactor:<learning rate>": Adafactor's own steps, shown as a schedule


@dataclass(frozen=True)
class LrScheduleOptions:
    """Options of the learning rate over the run. Steps below 1 are fractions of the run."""

    lr_scheduler: str
    lr_warmup_steps: int | float
    lr_decay_steps: int | float
    lr_scheduler_num_cycles: int
    lr_scheduler_power: float
    lr_scheduler_timescale: int | None
    lr_scheduler_min_lr_ratio: float | None
    lr_scheduler_type: str  # import path of a torch scheduler; replaces all of the above
    lr_scheduler_args: tuple[str, ...] | None  # key=value

    def __post_init__(self) -> None:
        check_at_least(
            "--lr_warmup_steps", self.lr_warmup_steps, 0, "steps, or a fraction of the run such as 0.05 or 5%"
        )
        check_at_least(
            "--lr_decay_steps", self.lr_decay_steps, 0, "steps, or a fraction of the run such as 0.05 or 5%"
        )
        check_at_least(
            "--lr_scheduler_num_cycles", self.lr_scheduler_num_cycles, 1, "the number of cosine cycles"
        )
        check_at_least(
            "--lr_scheduler_timescale",
            self.lr_scheduler_timescale,
            1,
            "leave it out to use the warm-up steps",
        )
        for option, value in (
            ("--lr_scheduler_power", self.lr_scheduler_power),
            ("--lr_scheduler_min_lr_ratio", self.lr_scheduler_min_lr_ratio),
        ):
            check_at_least(option, value, 0, "leave it out for the usual one")
            check_below(option, value, 1000, "leave it out for the usual one")
        arguments = read_literals("--lr_scheduler_args", self.lr_scheduler_args)
        if not self.lr_scheduler_type:
            self._check_named(arguments)

    def _check_named(self, arguments: dict[str, Any]) -> None:
        if self.lr_scheduler not in CURVES and self.lr_scheduler.partition(":")[0] != ADAFACTOR:
            names = (*CURVES, ADAFACTOR)
            raise OptionError(
                f"--lr_scheduler {self.lr_scheduler}: unknown.{did_you_mean(self.lr_scheduler, names)} Use "
                f"one of {', '.join(names)}, "
                "or give the import path of a torch scheduler to --lr_scheduler_type."
            )
        if self.lr_warmup_steps and (
            self.lr_scheduler == "constant" or self.lr_scheduler.partition(":")[0] == ADAFACTOR
        ):
            remedy = (
                "Use --lr_scheduler constant_with_warmup"
                if self.lr_scheduler == "constant"
                else "Adafactor has warmup_init=True"
            )
            raise OptionError(
                f"--lr_warmup_steps {self.lr_warmup_steps}: --lr_scheduler {self.lr_scheduler} has no "
                f"warm-up. {remedy}."
            )
        if self.lr_scheduler == "cosine_with_min_lr" and self.lr_scheduler_min_lr_ratio is None:
            raise OptionError(
                "--lr_scheduler cosine_with_min_lr needs --lr_scheduler_min_lr_ratio, e.g. 0.1 to end at a "
                "tenth"
            )
        if self.lr_scheduler == "piecewise_constant" and "step_rules" not in arguments:
            raise OptionError(
                "--lr_scheduler piecewise_constant needs --lr_scheduler_args step_rules='1:10,0.1:20,0.01' "
                "(factor:until step, ...)"
            )

    def arguments(self) -> dict[str, Any]:
        """Return `lr_scheduler_args` with their values read as Python literals."""
        return read_literals("--lr_scheduler_args", self.lr_scheduler_args)


def add_lr_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `LrScheduleOptions`."""
    group = parser.add_argument_group("learning-rate schedule")
    group.add_argument("--lr_scheduler", default="constant", help=", ".join((*CURVES, ADAFACTOR)))
    group.add_argument(
        "--lr_warmup_steps",
        type=int_or_float,
        default=0,
        help="rise from 0 during these steps; 0.05 or 5%% are fractions of the run",
    )
    group.add_argument(
        "--lr_decay_steps",
        type=int_or_float,
        default=0,
        help="length of the decay of warmup_stable_decay; fractions as for --lr_warmup_steps",
    )
    group.add_argument(
        "--lr_scheduler_num_cycles",
        type=int,
        default=1,
        help="cycles of cosine_with_restarts, cosine_with_min_lr, warmup_stable_decay",
    )
    group.add_argument("--lr_scheduler_power", type=float, default=1, help="power of polynomial")
    group.add_argument(
        "--lr_scheduler_timescale",
        type=int,
        help="time scale of inverse_sqrt; the warm-up steps when not given",
    )
    group.add_argument(
        "--lr_scheduler_min_lr_ratio",
        type=float,
        help="lowest factor of cosine_with_min_lr and warmup_stable_decay",
    )
    group.add_argument(
        "--lr_scheduler_type",
        default="",
        help="a class of torch.optim.lr_scheduler or package.module.Class instead of --lr_scheduler",
    )
    group.add_argument(
        "--lr_scheduler_args",
        nargs="*",
        metavar="KEY=VALUE",
        help="arguments of the scheduler, e.g. T_max=100",
    )
