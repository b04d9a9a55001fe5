"""Begin a run later than at its first step without a saved state (--initial_step, --initial_epoch)."""

import logging

from modules.errors import OptionError
from training.loop_options import StartOptions
from training.progress import Progress
from training.steps import StepPlan

logger = logging.getLogger(__name__)


def begin_later(options: StartOptions, progress: Progress, plan: StepPlan, is_resumed: bool) -> bool:
    """Put a new run's progress to the step where it begins. Returns whether it begins later.

    is_resumed: a saved state says where to go on instead. Raises OptionError if there is no such step.
    """
    if not options.is_given:
        return False
    given = "--initial_step" if options.initial_epoch is None else "--initial_epoch"
    if is_resumed:
        logger.info("%s is ignored because --resume goes on where the state was saved.", given)
        return False
    if options.initial_epoch is not None:
        step = plan.steps_until(options.initial_epoch - 1)
    else:
        step = options.initial_step or 0
    if step >= plan.total_steps:
        raise OptionError(
            f"{given} {options.initial_epoch or step} is step {step}, but the run ends at step "
            f"{plan.total_steps}: begin earlier, or give a larger --max_train_steps or --max_train_epochs"
        )
    epoch = step // plan.steps_per_epoch
    progress.step, progress.epoch = step, epoch
    progress.position = (step - plan.steps_until(epoch)) * plan.group_size
    logger.info("Beginning at step %d, epoch %d.", step, epoch + 1)
    return step > 0
