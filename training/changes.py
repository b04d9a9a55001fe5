"""Go on from a saved state although settings or clips differ (--resume_changed)."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.optim import Optimizer

from modules.options import options_with
from training.optimizers.lr_schedule import Imported, LrSchedule, Named
from training.reports.logs import public_config
from training.saving.states import SavedState, shorten_value
from training.steps import Progress, StepPlan

logger = logging.getLogger(__name__)

# names in `SavedState.identity`
GROUP_SIZE = "micro-batches per step (processes x --gradient_accumulation_steps)"
BATCHES = "batches of an epoch (--dataset_config and its caches)"
RATES = ("lr", "initial_lr")  # what a schedule sets in a group of the optimizer
# options that any resumed run may change; states record them so that a change can be listed
LISTED = (
    *("max_train_steps", "max_train_epochs", "validate_every_n_steps"),
    *("sample_every_n_steps", "sample_every_n_epochs"),
    *("save_every_n_steps", "save_every_n_epochs", "save_every_n_minutes"),
)


@dataclass(frozen=True)
class OptionChange:
    """One thing that differs from the saved run."""

    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.name}: {shorten_value(self.before)} -> {shorten_value(self.after)}"


def changeable(record: type) -> frozenset[str]:
    """Return the names in `SavedState.identity` that --resume_changed may change. record: of the options."""
    options = options_with(record, "resume_changed", True)
    return frozenset({*(f"--{name}" for name in options), GROUP_SIZE, BATCHES})


def listed_settings(options: Any) -> dict[str, Any]:
    """Return those of `TrainingOptions` that a resumed run may always change, to list a change."""
    config = public_config(options)
    return {f"--{name}": config[name] for name in LISTED}


def list_changes(*pairs: tuple[Any, Mapping[str, Any]]) -> list[OptionChange]:
    """Return the differences between saved settings and those of now. Settings not saved are left out."""
    return [
        OptionChange(name, saved[name], value)
        for saved, here in pairs
        if isinstance(saved, Mapping)
        for name, value in here.items()
        if name in saved and saved[name] != value
    ]


def plan_of(saved: SavedState, plan: StepPlan) -> StepPlan:
    """Return the plan of steps of the saved run. plan: of this run, which begins where that one's did."""
    batches = int(str(saved.identity[BATCHES]).partition(",")[0])
    return replace(plan, num_batches=batches, processes=1, accumulation=int(saved.identity[GROUP_SIZE]))


def take_over(changes: Sequence[OptionChange], progress: Progress, before: StepPlan) -> None:
    """Note the changes in the run's progress, which begins a new plan of steps if it has to.

    Other clips begin the current epoch again, in their own order; another size of a step goes on with the
    clips that are left of it. before: the plan of the saved run.
    """
    logger.info("--resume_changed: %d differ from the saved run:", len(changes))
    for change in changes:
        logger.info("  %s", change)
    progress.changes += [f"step {progress.step}: {change}" for change in changes]
    names = {change.name for change in changes}
    if not names & {GROUP_SIZE, BATCHES}:
        return
    if progress.position >= before.num_batches:
        progress.epoch, progress.position = progress.epoch + 1, 0
    if BATCHES in names:
        progress.position = 0
        logger.info("  Epoch %d begins again, with the clips of now.", progress.epoch + 1)
    progress.plan_epoch, progress.plan_position = progress.epoch, progress.position
    progress.plan_step = progress.step


def with_rates(saved: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's saved state with the learning rates that the optimizer has now."""
    groups = [
        {**group, **{name: own[name] for name in RATES if name in own and name in group}}
        for group, own in zip(saved["groups"], optimizer.param_groups, strict=False)
    ]
    return {**saved, "groups": groups}


def rebuild_schedule(schedule: LrSchedule, step: int) -> None:
    """Bring a new schedule to this step by its own settings. Call after the optimizer was restored.

    Raises OptionError if a class of torch does not go so far.
    """
    if isinstance(schedule, Named):
        schedule.load_state_dict({"step": step})
    elif isinstance(schedule, Imported):  # most of these compute each rate from the one before
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for _ in range(step):
                schedule.step()
