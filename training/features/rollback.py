"""Go back to a saved state with a smaller learning rate if the loss breaks away: --rollback_on_spike.

The loss of each step is read when it is logged, one step late, so no step waits for the device.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import HABIT, option
from training.features.contract import AT_WEIGHTS, Feature, FeatureOptions
from training.features.hooks import HookedModel, RunFeatures
from training.features.phases import LOG

if TYPE_CHECKING:
    from training.reports.logs import StepReport
    from training.training_run import TrainingRun

RECENT, BEFORE = 20, 100  # steps whose mean losses are compared: the last ones, and at most so many before
ROLLED_BACK = "rolled_back"  # metadata of saved files: how often


class RollbackOptions(FeatureOptions, title="going back", at=AT_WEIGHTS, facts=HABIT):
    """Options that return to a saved state if the loss breaks away."""

    rollback_on_spike: float | None = option(
        "go back to the last good saved state, with a smaller learning rate, if the mean loss of 20 steps is "
        "above FACTOR times that of the 100 before, or a loss is NaN; needs --save_state",
        above=1,
        maximum=1_000_000,
        metavar="FACTOR",
        hint="2 is usual",
    )
    rollback_times: int = option(
        "how often to go back at most",
        default=3,
        minimum=1,
        maximum=1000,
        acts_if={"there is no --rollback_on_spike": lambda options: options.rollback_on_spike is not None},
    )
    rollback_rate: float = option(
        "multiply the learning rate by this each time",
        default=0.5,
        above=0,
        maximum=1,
        acts_if={"there is no --rollback_on_spike": lambda options: options.rollback_on_spike is not None},
    )


@dataclass
class RollbackProgress:
    """How often a run went back, in saved states; field names are part of the state format."""

    times_rolled_back: int = 0


@dataclass
class RollbackLosses:
    """Losses of the last steps, in saved states: going back restores them too."""

    losses_before_rollback: list[float] = field(default_factory=list)  # at most RECENT + BEFORE


def is_spike(losses: "list[float]", factor: float) -> bool:
    """Return whether the mean of the last RECENT losses is above `factor` times that of those before."""
    recent, before = losses[-RECENT:], losses[:-RECENT]
    if len(before) < RECENT:
        return False
    return sum(recent) / len(recent) > factor * sum(before) / len(before)


def go_back_if_spike(run: "TrainingRun", report: "StepReport", *, options: RollbackOptions) -> None:
    """Record the loss of a step, and go back if the loss has broken away. All processes call this.

    Raises:
        Rewind: If the run goes back.
    """
    from training.reports.logs import GRADIENT_NORM_COLUMN, LOSS_COLUMN  # loads torch

    assert options.rollback_on_spike is not None  # the feature is on
    progress = run.progress.feature_state(RollbackProgress)
    losses = run.progress.feature_state(RollbackLosses).losses_before_rollback
    loss, norm = report.values[LOSS_COLUMN], report.values[GRADIENT_NORM_COLUMN]
    is_bad = not (math.isfinite(loss) and (math.isfinite(norm) or run.has_scaler))
    if report.skipped or (is_bad and run.has_scaler):  # it has changed no weight
        return
    reason = f"The loss of step {report.step} is {loss}"
    if not is_bad:
        losses.append(loss)
        del losses[: -RECENT - BEFORE]
        if not is_spike(losses, options.rollback_on_spike):
            return
        recent, before = sum(losses[-RECENT:]) / RECENT, losses[:-RECENT]
        reason = (
            f"Until step {report.step}, the loss rose from {sum(before) / len(before):.4g} to {recent:.4g}"
        )
        losses.clear()  # if the run continues, this spike counts once
    if progress.times_rolled_back >= options.rollback_times:
        run.note(
            f"{reason}; the run went back {options.rollback_times} times, and does not again", report.step
        )
        return
    state = run.find_earlier_state(report.step - RECENT)
    if state is None:
        run.note(
            f"{reason}; there is no state to go back to that was saved {RECENT} steps before", report.step
        )
        return
    progress.times_rolled_back += 1
    run.features.info.in_files[ROLLED_BACK] = progress.times_rolled_back
    reason += f" ({progress.times_rolled_back} of at most {options.rollback_times} times)"
    run.go_back(state, reason, options.rollback_rate, kept=[RollbackProgress])


def _check_states(run: RunFeatures) -> None:
    """Raise OptionError if no states are saved to go back to."""
    saving = run.options.saving
    intervals = (saving.save_every_n_steps, saving.save_every_n_epochs, saving.save_every_n_minutes)
    if not saving.save_state or not any(intervals):
        raise OptionError(
            "--rollback_on_spike needs saved states to go back to: pass --save_state and "
            "--save_every_n_steps 100"
        )


def _check_schedule(run: RunFeatures, model: HookedModel) -> None:
    """Raise OptionError if the learning rate cannot be lowered; describe what a resumed run did before."""
    if not model.schedule.can_scale:
        raise OptionError(
            f"--rollback_on_spike lowers the learning rate, which {model.schedule.name} sets by itself. Use "
            "another --optimizer_type, and --lr_scheduler instead of --lr_scheduler_type"
        )
    times = model.plan.progress.feature_state(RollbackProgress).times_rolled_back
    if times:
        run.info.in_files[ROLLED_BACK] = times


def _join(run: RunFeatures, options: RollbackOptions) -> None:
    _check_states(run)
    run.progress_records += [RollbackProgress, RollbackLosses]
    run.on.after_load.append(partial(_check_schedule, run))
    run.before(LOG, partial(go_back_if_spike, options=options))


ROLLBACK = Feature(
    name="rollback",
    options=RollbackOptions,
    is_on=lambda options: options.rollback_on_spike is not None,
    join=_join,
)
