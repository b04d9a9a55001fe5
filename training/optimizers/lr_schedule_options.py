"""Options of the learning-rate schedule."""

from typing import Any

from modules.command import did_you_mean
from modules.errors import OptionError
from modules.option_values import int_or_float, read_literals
from modules.options import Options, option

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


OF_STEPS = "steps, or a fraction of the run such as 0.05 or 5%"


class LrScheduleOptions(Options, title="learning-rate schedule"):
    """Options of the learning rate over the run. Steps below 1 are fractions of the run."""

    lr_scheduler: str = option(", ".join((*CURVES, ADAFACTOR)), default="constant", often=True)
    lr_warmup_steps: int | float = option(
        "rise from 0 during these steps; 0.05 or 5%% are fractions of the run",
        default=0,
        type=int_or_float,
        least=0,
        hint=OF_STEPS,
    )
    lr_decay_steps: int | float = option(
        "length of the decay of warmup_stable_decay; fractions as for --lr_warmup_steps",
        default=0,
        type=int_or_float,
        least=0,
        hint=OF_STEPS,
    )
    lr_scheduler_num_cycles: int = option(
        "cycles of cosine_with_restarts, cosine_with_min_lr, warmup_stable_decay", default=1, least=1
    )
    lr_scheduler_power: float = option("power of polynomial", default=1, least=0, below=1000)
    lr_scheduler_timescale: int | None = option(
        "time scale of inverse_sqrt; the warm-up steps when not given", least=1
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        "lowest factor of cosine_with_min_lr and warmup_stable_decay", least=0, below=1000
    )
    lr_scheduler_type: str = option(
        "a class of torch.optim.lr_scheduler or package.module.Class instead of --lr_scheduler", default=""
    )
    lr_scheduler_args: tuple[str, ...] | None = option(
        "arguments of the scheduler, e.g. T_max=100", metavar="KEY=VALUE"
    )

    def __post_init__(self) -> None:
        arguments = self.arguments()
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
