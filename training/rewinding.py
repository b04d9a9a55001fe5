"""Continue a run from one of its own saved states, without starting it again."""

import logging
from datetime import datetime

from training.optimizers.lr_schedule import CurveSchedule, PlateauSchedule
from training.saver import restore_state
from training.saving import states
from training.saving.files import move_aside
from training.training_run import Rewind, TrainingRun

logger = logging.getLogger(__name__)


def rewind(run: TrainingRun, request: Rewind) -> None:
    """Restore a state, lower the learning rates, and move later states aside. All processes must call this.

    Raises:
        CheckpointError: If the state is damaged.
    """
    saved = states.read_state(request.state)
    assert isinstance(saved, states.SavedState)  # this run has saved it
    schedule = run.model.schedule
    assert isinstance(schedule, (CurveSchedule, PlateauSchedule))  # `can_scale`
    scale = schedule.scale * request.rate_factor
    run.progress.go_back_to(saved.progress, request.kept)
    step = run.progress.step
    restore_state(run.model, saved)
    saved.release()
    schedule.set_scale(scale)
    run.model.optimizer.zero_grad(set_to_none=True)
    run.model.trainable.thaw(step)
    run.delayed_reports.drop()
    run.requests.reasons.clear()
    run.reporter.rewind(step)
    for act in run.features.on.rewind:
        act(step)
    if run.is_main:
        names = run.plan.names
        later = [state.folder for state in states.list_states(names.folder, names.name) if state.step > step]
        moved = move_aside(names, later, datetime.now())
        if moved is not None:
            logger.info("States of later steps are now in %s.", moved)
    rates = ", ".join(f"{rate:.3g}" for rate in schedule.get_last_lr())
    run.note(f"{request.reason}. The run continues from here, with the learning rate {rates}")
    run.plan.accelerator.wait_for_everyone()
