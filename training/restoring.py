"""Take the state of a run, and bring a run into a saved state."""

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from modules.offload.block_swap import settle_all
from training.averages import PART as AVERAGE
from training.changes import listed_settings, rebuild_schedule, with_rates
from training.optimizers.state import optimizer_state, restore_foreign_optimizer, restore_optimizer
from training.saving.states import ForeignState, SavedState, load_module, one_error
from training.training_run import TrainingRun

logger = logging.getLogger(__name__)


def take_state(run: TrainingRun) -> SavedState:
    """Return everything that resuming needs, not copied.

    Call between steps, while the training weights are loaded.
    """
    settle_all(run.dits.networks)
    plan = run.plan
    parts: dict[str, Mapping[str, Tensor]] = {
        name: module.state_dict() for name, module in run.trainable.modules.items()
    }
    if average := run.average.tensors():
        parts[AVERAGE] = average
    return SavedState(
        Path(),
        plan.progress,
        plan.identity,
        plan.habits,
        parts,
        optimizer_state(run.optimizer, run.trainable.names),
        run.schedule.state_dict(),
        run.scaler.state_dict(),
        run.average.described(),
        listed_settings(plan.options),
    )


def restore(run: TrainingRun) -> None:
    """Bring the run into the state that its plan names. Raises CheckpointError if something does not fit."""
    saved, step = run.plan.saved, run.progress.step
    if saved is None:
        if step:  # begun later
            rebuild_schedule(run.schedule, step)
        return
    with one_error(saved.folder):
        if isinstance(saved, SavedState):
            _restore_own(run, saved)
            logger.info("Continuing at step %d, epoch %d.", step, run.progress.epoch + 1)
        else:
            _restore_foreign(run, saved)
    saved.release()


def _restore_own(run: TrainingRun, saved: SavedState) -> None:
    for name, module in run.trainable.modules.items():
        load_module(module, saved.parts[name])
    is_changed = bool(run.plan.changes)  # learning rates follow from the settings of now
    kept = with_rates(saved.optimizer, run.optimizer) if is_changed else saved.optimizer
    restore_optimizer(run.optimizer, run.trainable.names, kept, run.device)
    if is_changed:
        rebuild_schedule(run.schedule, run.progress.step)
    else:
        run.schedule.load_state_dict(saved.schedule)
    if saved.scaler:
        run.scaler.load_state_dict(saved.scaler)
    run.average.restore(saved)


def _restore_foreign(run: TrainingRun, saved: ForeignState) -> None:
    module = next(iter(run.trainable.modules.values()))  # beside it may be what no file holds
    load_module(module, saved.network)
    run.average.begin()
    if saved.optimizer:
        restore_foreign_optimizer(run.optimizer, saved.optimizer, run.device)
    logger.warning(
        "%s was made by another program and does not record its progress: weights and optimizer are "
        "restored, while steps, epochs and the learning-rate schedule start from 0.",
        saved.folder,
    )
