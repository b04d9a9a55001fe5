"""The learning rate over the run: curves by step, or a rate that falls by the validation loss.

Schedules are stepped once per optimizer step.
"""

import logging
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, ClassVar

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from modules.errors import CheckpointError, OptionError
from training.learning_options import ADAFACTOR, PLATEAU, LrScheduleOptions
from training.optimizers.optimizer import check_arguments, import_object, needs_no_schedule
from training.saving.states import to_builtin_types

logger = logging.getLogger(__name__)

SCALE = "scale"  # key of a state: what multiplies all rates, if not 1
POLYNOMIAL_END = 1e-7  # the learning rate at which the polynomial curve ends, as in the known tuners
INVERSE_SQRT_TIMESCALE = 10_000  # default without a time scale and without a warm-up
# attributes that torch's schedulers change while they step
COUNTER_ATTRIBUTES = frozenset({"last_epoch", "_step_count", "_last_lr", "T_cur", "T_i"})
TEXT_ARGUMENTS = {"step_rules", "threshold_mode"}  # of --lr_scheduler_args; others are numbers
LARGEST_ARGUMENT = 1e12  # limit for --lr_scheduler_args; the comparison also rejects NaN


def make_lr_schedule(options: LrScheduleOptions, optimizer: Optimizer, total_steps: int) -> "LrSchedule":
    """Create the schedule for this optimizer and this number of optimizer steps.

    * An optimizer that adapts its own rates (schedule-free, Adafactor's relative_step) keeps them.
    * --lr_scheduler_type names a scheduler class of torch or of another package.
    * --lr_scheduler plateau lowers the rate if the validation loss no longer falls.
    * Otherwise --lr_scheduler names one of the curves of this file.

    Raises:
        OptionError: If the options conflict.
    """
    if needs_no_schedule(optimizer):  # a schedule-free optimizer
        # Warn of options of the schedule that a schedule-free optimizer ignores
        has_schedule = options.lr_scheduler != "constant" or bool(options.lr_scheduler_type)
        if has_schedule or options.lr_warmup_steps or options.lr_scheduler_args:
            logger.warning(
                f"{type(optimizer).__name__} needs no schedule: --lr_scheduler and its warm-up are ignored; "
                "some of these optimizers take --optimizer_args warmup_steps=N."
            )
        return OptimizerRates(
            "schedule-free", optimizer, lambda: [float(group["lr"]) for group in optimizer.param_groups]
        )
    if options.lr_scheduler_type:
        return ImportedSchedule(options.lr_scheduler_type, _import_scheduler(options, optimizer))
    name, _, initial_rate = options.lr_scheduler.partition(":")  # adafactor:RATE
    if optimizer.defaults.get("relative_step"):  # an Adafactor that sets its rate from the step
        return OptimizerRates(
            ADAFACTOR, optimizer, lambda: _read_adafactor_rates(optimizer, float(initial_rate or 0))
        )
    if name == ADAFACTOR:
        raise OptionError("--lr_scheduler adafactor needs --optimizer_type Adafactor and relative_step=True")
    if "relative_step" in optimizer.defaults and name != "constant_with_warmup":
        logger.warning(
            "Adafactor without relative_step usually runs with --lr_scheduler constant_with_warmup, not "
            f"{name}."
        )
    if name == PLATEAU:
        warmup = count_steps(options.lr_warmup_steps, total_steps)
        return PlateauSchedule(optimizer, _read_plateau_settings(options), warmup)
    rate = optimizer.defaults.get("lr", optimizer.param_groups[0]["lr"])  # a wrapper may have no defaults
    return CurveSchedule(name, optimizer, make_curve(name, options, total_steps, float(rate)))


def make_curve(
    name: str, options: LrScheduleOptions, total_steps: int, learning_rate: float
) -> Callable[[int], float]:
    """Return a curve by name: a function that maps the step, from 0, to a multiplier of the learning rate.

    Raises:
        OptionError: If an argument is unknown.
    """
    arguments = options.arguments()
    if arguments:
        _check_arguments(options, ARGUMENTS_BY_SCHEDULER.get(options.lr_scheduler, ()))
    warmup = count_steps(options.lr_warmup_steps, total_steps)
    decay = count_steps(options.lr_decay_steps, total_steps)
    curve_arguments: dict[str, Any] = {
        "num_cycles": options.lr_scheduler_num_cycles,
        "power": options.lr_scheduler_power,
        "timescale": options.lr_scheduler_timescale,
        "min_lr_ratio": options.lr_scheduler_min_lr_ratio or 0.0,
        "lr_end": POLYNOMIAL_END,
        "step_rules": "",
        **arguments,
    }
    if options.lr_scheduler == "warmup_stable_decay" and warmup + decay > total_steps:
        raise OptionError(
            f"--lr_warmup_steps {warmup} and --lr_decay_steps {decay} exceed the {total_steps} steps of the "
            "run"
        )
    lr_end = curve_arguments["lr_end"]
    if options.lr_scheduler == "polynomial" and learning_rate <= lr_end:
        raise OptionError(
            f"--learning_rate {learning_rate}: the polynomial schedule ends at {lr_end}; start "
            "above, or set lr_end"
        )
    if options.lr_scheduler == "piecewise_constant":
        _read_rules(curve_arguments["step_rules"])  # only for its errors: each step parses them again
    return partial(factor_at, name, total_steps, warmup, decay, learning_rate, **curve_arguments)


def _check_arguments(options: LrScheduleOptions, allowed: Collection[str]) -> None:
    """Raise OptionError for a wrong argument of --lr_scheduler_args."""
    arguments = options.arguments()
    unknown = sorted(set(arguments) - set(allowed))
    if unknown:
        choices = f"it has {', '.join(allowed)}" if allowed else "it has none"
        raise OptionError(
            f"--lr_scheduler_args {unknown[0]}: --lr_scheduler {options.lr_scheduler} has no such "
            f"argument; {choices}."
        )
    for key in arguments.keys() - TEXT_ARGUMENTS:
        if not isinstance(arguments[key], (int, float)) or not abs(arguments[key]) < LARGEST_ARGUMENT:
            raise OptionError(f"--lr_scheduler_args {key}={arguments[key]}: use a number, such as {key}=1")


def count_steps(steps: int | float, total_steps: int) -> int:
    """Convert `steps` to a number of steps; a float is a fraction of the run's steps."""
    return steps if isinstance(steps, int) else int(steps * total_steps)


def factor_at(
    name: str,
    total: int,
    warmup: int,
    decay: int,
    learning_rate: float,
    step: int,
    *,
    num_cycles: float,
    power: float,
    timescale: float | None,
    min_lr_ratio: float,
    lr_end: float,
    step_rules: str,
) -> float:
    """Return the multiplier of the learning rate at a step, for the curve `name` of --lr_scheduler.

    During the warmup, every curve except piecewise_constant rises linearly.

    Args:
        name: Name of the curve.
        total: Number of steps of the run.
        warmup: Number of steps of the warmup.
        decay: Number of steps of the decay at the end.
        learning_rate: Learning rate of the group, for curves whose final rate is absolute.
        step: Index of the step, from 0.
        num_cycles: Number of cycles of a cosine.
        power: Exponent of a polynomial.
        timescale: Time scale of an inverse square root; None for its default.
        min_lr_ratio: Smallest factor.
        lr_end: Learning rate at the end of a polynomial.
        step_rules: Factors by step, as text.
    """
    if name == "piecewise_constant":  # it has no warm-up
        rules, last_factor = _read_rules(step_rules)
        return next((factor for factor, end_step in rules if step < end_step), last_factor)
    if step < warmup:
        minimum = min_lr_ratio if name == "warmup_stable_decay" else 0.0
        return _raise_to_minimum(minimum, step / warmup)
    # 0 at the end of the warm-up, 1 at the end of the run
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    match name:
        case "linear":
            return 1 - progress
        case "cosine":
            return _half_cosine(progress)
        case "cosine_with_restarts":
            return 0.0 if progress >= 1 else _half_cosine(num_cycles * progress % 1)
        case "cosine_with_min_lr":
            return _raise_to_minimum(min_lr_ratio, _half_cosine(num_cycles * progress))
        case "polynomial":
            return ((learning_rate - lr_end) * (1 - progress) ** power + lr_end) / learning_rate
        case "inverse_sqrt":
            timescale = timescale or warmup or INVERSE_SQRT_TIMESCALE
            return 1 / math.sqrt((step + timescale - warmup) / timescale)
        case "warmup_stable_decay":
            decayed_steps = step - (total - decay)
            if decayed_steps < 0:  # the decay has not begun
                return 1.0
            if decayed_steps >= decay:
                return min_lr_ratio if decay else 1.0
            return _raise_to_minimum(min_lr_ratio, _half_cosine(num_cycles * decayed_steps / decay))
        case _:  # constant, with a warm-up or without
            return 1.0


# what --lr_scheduler_args can set, for each curve
ARGUMENTS_BY_SCHEDULER: dict[str, tuple[str, ...]] = {
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("min_lr_ratio", "num_cycles"),
    "warmup_stable_decay": ("min_lr_ratio", "num_cycles"),
    "piecewise_constant": ("step_rules",),
}


def _half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _raise_to_minimum(minimum: float, factor: float) -> float:
    """Map a factor of 0..1 linearly to minimum..1."""
    return factor * (1 - minimum) + minimum


def _read_rules(text: str) -> tuple[list[tuple[float, int]], float]:
    """Parse the step rules of piecewise_constant."""
    # `1:10,0.1:20,0.01` is [(1, 10), (0.1, 20)], 0.01: factor 1 below step 10, 0.1 below step 20, then 0.01.
    *rules, last_factor = str(text).split(",")
    try:
        parsed: list[tuple[float, int]] = []  # factor, first step at which it no longer applies
        for rule in rules:
            factor, end_step = rule.split(":")
            parsed.append((float(factor), int(end_step)))
        return parsed, float(last_factor)
    except ValueError:
        raise OptionError(
            f"--lr_scheduler_args step_rules={text}: write factor:until step, ..., last factor, such "
            "as 1:10,0.1:20,0.01"
        ) from None


# Schedules. Their state has plain values and is restored after the optimizer's; `go_to` needs no state.


class CurveSchedule(LambdaLR):
    """Learning rate schedule with one of the curves of `factor_at`; its state is the step and a scale."""

    can_scale: ClassVar[bool] = True  # has `set_scale`

    def __init__(self, name: str, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        """Start at step 0. `factor(step)` returns the multiplier of the learning rate."""
        self.name = name
        self.scale = 1.0  # multiplies all rates; below 1 after the run went back
        super().__init__(optimizer, factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the current step, since the learning rate is a function of step and options, and a scale."""
        return {"step": self.last_epoch} | ({} if self.scale == 1 else {SCALE: self.scale})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to the saved step; learning rates follow from it and from this run's --learning_rate."""
        if "step" not in state_dict:
            raise CheckpointError(_explain_other_schedule(self.name))
        self.scale = float(state_dict.get(SCALE, 1.0))
        self.go_to(state_dict["step"])

    def set_scale(self, scale: float) -> None:
        """Multiply all learning rates by a number from now on."""
        self.scale = scale
        self.go_to(self.last_epoch)

    def observe(self, step: int, loss: float) -> str:
        """Return "": no validation loss changes a curve."""
        return ""

    def step(self, epoch: int | None = None) -> None:
        """Advance by one optimizer step; `epoch`, part of torch's interface, is ignored."""
        # torch's method would warn if another function steps the optimizer, as for bf16 weights
        self.go_to(self.last_epoch + 1)

    def go_to(self, step: int) -> None:
        """Set the learning rates of `step` directly, without running the steps before it."""
        self.last_epoch = step
        self._step_count = step + 1
        self._last_lr = [
            base * factor(step) * self.scale
            for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


@dataclass(frozen=True)
class PlateauSettings:
    """Settings of `PlateauSchedule`: names, meanings and defaults of torch's ReduceLROnPlateau."""

    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: str = "rel"
    cooldown: int = 0
    min_lr: float = 0.0
    eps: float = 1e-8


@dataclass
class PlateauProgress:
    """What a plateau schedule has seen, in saved states; field names are part of the state format."""

    rates: list[float]  # learning rate of each group without the warm-up
    best: float = math.inf
    num_bad: int = 0  # measurements in a row that were not below the best one
    cooldown: int = 0  # measurements during which none counts as bad
    measured_step: int = 0  # step of the last measurement


@dataclass
class PlateauSchedule:
    """Learning rate that is lowered if the validation loss has not fallen for some measurements.

    The rule is that of torch's ReduceLROnPlateau in the mode `min`, with measurements in place of epochs.
    """

    can_scale: ClassVar[bool] = True
    optimizer: Optimizer
    settings: PlateauSettings
    warmup: int  # steps during which the rate rises linearly
    last_step: int = 0
    scale: float = 1.0  # multiplies all rates; below 1 after the run went back
    progress: PlateauProgress = field(init=False)
    name: str = field(init=False, default=PLATEAU)

    def __post_init__(self) -> None:
        self.progress = PlateauProgress([float(group["lr"]) for group in self.optimizer.param_groups])
        self.go_to(0)

    def observe(self, step: int, loss: float) -> str:
        """Take a validation loss into account; return a sentence if the rate was lowered, else "".

        Args:
            step: Number of optimizer steps taken. A second measurement at a step, and the one before the
                first step, do not count.
            loss: The validation loss.
        """
        progress, settings = self.progress, self.settings
        if step <= progress.measured_step:
            return ""
        progress.measured_step = step
        limit = progress.best - settings.threshold
        if settings.threshold_mode == "rel":
            limit = progress.best * (1.0 - settings.threshold)
        is_better = loss < limit
        if is_better:
            progress.best = loss
        progress.num_bad = 0 if is_better else progress.num_bad + 1
        if progress.cooldown > 0:
            progress.cooldown -= 1
            progress.num_bad = 0
        if progress.num_bad <= settings.patience:
            return ""
        progress.cooldown, progress.num_bad = settings.cooldown, 0
        before = progress.rates
        lower_rates = [max(rate * settings.factor, settings.min_lr) for rate in before]
        # a rate stays as it is if it would change next to nothing
        progress.rates = [
            lower if rate - lower > settings.eps else rate
            for rate, lower in zip(before, lower_rates, strict=True)
        ]
        self.go_to(self.last_step)
        if progress.rates == before:
            return ""
        rates = ", ".join(f"{rate:.3g}" for rate in progress.rates)
        return f"The validation loss is not below {progress.best:.5f}: learning rate {rates}"

    def step(self) -> None:
        """Advance by one optimizer step."""
        self.go_to(self.last_step + 1)

    def go_to(self, step: int) -> None:
        """Set the learning rates of `step`, with the reductions so far."""
        self.last_step = step
        factor = self.scale * (step / self.warmup if step < self.warmup else 1.0)
        for group, rate in zip(self.optimizer.param_groups, self.progress.rates, strict=True):
            group["lr"] = rate * factor

    def set_scale(self, scale: float) -> None:
        """Multiply all learning rates by a number from now on."""
        self.scale = scale
        self.go_to(self.last_step)

    def get_last_lr(self) -> list[float]:
        """Return the current learning rate of each group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the step and what was measured, as plain values."""
        state = {"step": self.last_step, PLATEAU: asdict(self.progress)}
        return state | ({} if self.scale == 1 else {SCALE: self.scale})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the step and, from a state of this schedule, the reductions and what was measured.

        Raises:
            CheckpointError: If the state was saved by another kind of schedule than a curve or this one.
        """
        if "step" not in state_dict:
            raise CheckpointError(_explain_other_schedule(self.name))
        if PLATEAU in state_dict:
            saved = dict(state_dict[PLATEAU])
            known = {one.name for one in fields(PlateauProgress)}
            if saved.keys() != known or len(saved["rates"]) != len(self.progress.rates):
                raise CheckpointError(_explain_other_schedule(self.name))
            self.progress = PlateauProgress(**saved)
        self.scale = float(state_dict.get(SCALE, 1.0))
        self.go_to(int(state_dict["step"]))


@dataclass(frozen=True)
class ImportedSchedule:
    """Learning rate schedule that wraps a scheduler class of PyTorch or of another package."""

    can_scale: ClassVar[bool] = False
    name: str
    scheduler: LRScheduler

    def observe(self, step: int, loss: float) -> str:
        """Return "": the wrapped scheduler counts steps only."""
        return ""

    def step(self) -> None:
        """Run one step of the wrapped scheduler.

        Raises:
            OptionError: If the scheduler has ended, as OneCycleLR does after `total_steps`.
        """
        try:
            self.scheduler.step()
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise OptionError(
                f"--lr_scheduler_type {self.name}: {reason}. Use other --lr_scheduler_args, e.g. for more "
                "steps"
            ) from error

    def get_last_lr(self) -> list[float]:
        """Return the wrapped scheduler's learning rates as floats; some schedulers return tensors."""
        return [float(rate) for rate in self.scheduler.get_last_lr()]

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped scheduler's state without its functions, as plain values that need no pickle."""
        plain = {key: value for key, value in self.scheduler.state_dict().items() if not callable(value)}
        return {"scheduler": to_builtin_types(plain, "scheduler")}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the wrapped scheduler: all of its state, or only the counters of a torch scheduler.

        The settings of torch schedulers come from this run's options.

        Raises:
            CheckpointError: If the state was saved by another kind of schedule.
        """
        if "scheduler" not in state_dict:
            raise CheckpointError(_explain_other_schedule(self.name))
        saved = dict(state_dict["scheduler"])
        is_torch_scheduler = type(self.scheduler).__module__ == LRScheduler.__module__
        if is_torch_scheduler:
            saved = {name: value for name, value in saved.items() if name in COUNTER_ATTRIBUTES}
        self.scheduler.load_state_dict(saved)

    def go_to(self, step: int) -> None:
        """Call `step()` `step` times, because most schedulers compute each rate from the previous one."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for _ in range(step):
                self.step()


@dataclass(frozen=True)
class OptimizerRates:
    """No-op schedule, for an optimizer that adapts its learning rates itself."""

    can_scale: ClassVar[bool] = False
    name: str
    optimizer: Optimizer
    rates: Callable[[], list[float]]

    def observe(self, step: int, loss: float) -> str:
        """Return "": the optimizer computes its own rates."""
        return ""

    def step(self) -> None:
        """Do nothing: the optimizer computes its own rates."""

    def get_last_lr(self) -> list[float]:
        """Return the learning rates that the optimizer currently uses."""
        return self.rates()

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict, since the learning rates are part of the optimizer's state."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Do nothing, since the learning rates are part of the optimizer's state."""

    def go_to(self, step: int) -> None:
        """Do nothing: the optimizer computes its own rates."""


LrSchedule = CurveSchedule | PlateauSchedule | ImportedSchedule | OptimizerRates


def _explain_other_schedule(name: str) -> str:
    return (
        f"the saved learning-rate schedule is of a different kind than {name}: use --lr_scheduler and "
        "--lr_scheduler_type of that run"
    )


def _read_adafactor_rates(optimizer: Any, before: float) -> list[float]:
    """Return the learning rate that Adafactor last used for each group; `before` for unstepped groups."""
    rates = []
    for group in optimizer.param_groups:
        state = optimizer.state.get(group["params"][0], {})
        rates.append(float(optimizer._get_lr(group, state)) if "step" in state else before)
    return rates


def _read_plateau_settings(options: LrScheduleOptions) -> PlateauSettings:
    """Return the settings in --lr_scheduler_args. Raises OptionError if there is a wrong one."""
    arguments = options.arguments()
    _check_arguments(options, [one.name for one in fields(PlateauSettings)])
    settings = PlateauSettings(**arguments)
    for name in ("patience", "cooldown"):
        if not isinstance(getattr(settings, name), int):
            raise OptionError(f"--lr_scheduler_args {name}={arguments[name]}: use a whole number")
    for name in arguments.keys() - TEXT_ARGUMENTS:
        if arguments[name] < 0:
            raise OptionError(f"--lr_scheduler_args {name}={arguments[name]}: use a number from 0 on")
    if not 0 < settings.factor < 1:
        raise OptionError(
            f"--lr_scheduler_args factor={settings.factor}: use a number between 0 and 1, such as factor=0.5"
        )
    if settings.threshold_mode not in ("rel", "abs"):
        raise OptionError(
            f"--lr_scheduler_args threshold_mode={settings.threshold_mode}: use rel (a share of the best "
            "loss) or abs"
        )
    return settings


def _import_scheduler(options: LrScheduleOptions, optimizer: Optimizer) -> LRScheduler:
    """Create the scheduler that --lr_scheduler_type names: a class from torch or another package."""
    type_name = options.lr_scheduler_type
    module, _, name = type_name.rpartition(".")
    scheduler_class = import_object(
        "--lr_scheduler_type", type_name, module or "torch.optim.lr_scheduler", name
    )
    if scheduler_class is ReduceLROnPlateau:
        raise OptionError(
            "--lr_scheduler_type ReduceLROnPlateau needs a value for each step; use --lr_scheduler plateau, "
            "which does the same by the validation loss"
        )
    # a function is rejected, because it could do anything with the arguments
    if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, LRScheduler):
        raise OptionError(
            f"--lr_scheduler_type {type_name}: is not a learning-rate scheduler. Pass a subclass of "
            "torch.optim.lr_scheduler.LRScheduler, such as CosineAnnealingLR, or omit it and use "
            "--lr_scheduler."
        )
    check_arguments("--lr_scheduler_args", scheduler_class, options.arguments(), {"optimizer"})
    try:
        return scheduler_class(optimizer, **options.arguments())
    except Exception as error:  # classes raise errors of any type for unsuitable arguments
        reason = str(error) or type(error).__name__
        raise OptionError(f"--lr_scheduler_type {type_name} rejects --lr_scheduler_args: {reason}") from None
