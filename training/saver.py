"""Make the saver of a run: files with their metadata, averages, states and the card; restore a state."""

import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from modules.devices import DTYPES
from modules.offload.block_swap import settle_all
from training.averages import PART as AVERAGE
from training.experts import dtype_of, expert_metadata
from training.metadata import file_metadata, run_metadata
from training.optimizers.optimizer import finished_weights
from training.optimizers.state import optimizer_state, restore_foreign_optimizer, restore_optimizer
from training.options import TrainingOptions
from training.resuming import listed_settings
from training.saving.files import NoSaver, Publish, Saver
from training.saving.hub import write_card
from training.saving.states import ForeignState, SavedState, load_module, one_error, write_state
from training.training_run import TrainingRun

logger = logging.getLogger(__name__)

RATES = ("lr", "initial_lr")  # what a schedule sets in a group of the optimizer


def make_saver(
    run: TrainingRun, publish: Callable[[Path, str | None], None], publish_state: Publish
) -> Saver | NoSaver:
    """Make the saver in the main process; the others save nothing.

    publish: is given the file and the model card.
    """
    plan, options, progress, trainable = run.plan, run.options, run.progress, run.trainable
    if not plan.accelerator.is_main_process:
        return NoSaver()
    family = plan.family
    run_values = run_metadata(plan, run.optimizer_name, run.schedule.name)
    dtype = file_dtype(options, run.dits.networks[0])
    parts = list(trainable.writes)

    def metadata_now(part: str) -> dict[str, str]:
        epoch = progress.epoch + (progress.position > 0 or progress.step == 0)
        own = run_values | expert_metadata(family, options, part)
        licence = family.release.licence
        return file_metadata(own, options, family.metadata, progress.step, epoch, datetime.now(), licence)

    def write_file(part: str, path: Path) -> None:
        settle_all(run.dits.networks)
        with finished_weights(run.optimizer, trainable.parameters):
            trainable.writes[part](path, dtype, metadata_now(part))

    def write_average(part: str, path: Path) -> None:
        with run.average.in_place():
            own = {} if options.metadata.no_metadata else run.average.metadata
            trainable.writes[part](path, dtype, {**metadata_now(part), **own})

    card = None
    if options.hub.huggingface_repo_id is not None:
        prompts = [prompt for prompt in run.sampler.prompts if prompt]
        is_lora = options.network is not None
        card = write_card(plan.output_name, is_lora, family.release, metadata_now(parts[0]), prompts)
    saver = Saver(
        options.saving,
        plan.names,
        {part: partial(write_file, part) for part in parts},
        lambda folder: write_state(folder, take_state(run)),
        lambda path: publish(path, card),
        publish_state,
        {part: partial(write_average, part) for part in parts} if run.average.tensors() else {},
    )
    saver.remove_leftovers()
    saver.tidy_steps(progress.step)  # what a run that was killed had no time for
    saver.tidy_epochs(progress.epoch)
    return saver


def file_dtype(options: TrainingOptions, dit: nn.Module) -> torch.dtype | None:
    """Return the dtype of saved models; None: every tensor as it is."""
    precision = options.saving.save_precision
    if precision is not None:
        return DTYPES[precision]
    return None if options.network is None else dtype_of(dit)


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
            run.schedule.go_to(step)
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
    kept, is_changed = saved.optimizer, bool(run.plan.changes)
    if is_changed:  # learning rates follow from the settings of now
        groups = [
            {**group, **{name: own[name] for name in RATES if name in own and name in group}}
            for group, own in zip(kept["groups"], run.optimizer.param_groups, strict=False)
        ]
        kept = {**kept, "groups": groups}
    restore_optimizer(run.optimizer, run.trainable.names, kept, run.device)
    if is_changed:
        run.schedule.go_to(run.progress.step)
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
