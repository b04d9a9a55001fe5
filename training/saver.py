"""Make the saver of a run: files, averages, states and the card; restore a state."""

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modules.devices import DTYPES, dtype_of
from modules.errors import OptionError
from modules.installation import import_own
from modules.offload.block_swap import settle_all
from modules.offload.sharding import as_split
from training.experts import expert_metadata
from training.metadata import continued_sizes, file_metadata, run_metadata
from training.optimizers.optimizer import (
    finished_weights,
    optimizer_state,
    restore_foreign_optimizer,
    restore_optimizer,
)
from training.optimizers.stepping import steps_numbers
from training.options import TrainingOptions
from training.plan import TrainingPlan
from training.resuming import listed_settings
from training.saving import states
from training.saving.files import Saver
from training.training_run import TrainedModel

if TYPE_CHECKING:  # it is loaded only if files are uploaded
    from training.saving.hub import Uploads

logger = logging.getLogger(__name__)

RATES = ("lr", "initial_lr")  # what a schedule sets in a group of the optimizer


def make_saver(
    model: TrainedModel,
    uploads: "Uploads | None",
    prompts: Sequence[str],
    note_saved: Callable[[Sequence[Path], int], None],
) -> Saver | None:
    """Make the saver in the main process, and remove files that it no longer keeps; else return None.

    uploads: None without a repository. prompts: of the samples, for the card. note_saved: gets the files of
    each save, and the step.
    """
    plan, trainable = model.plan, model.trainable
    options, progress = plan.options, plan.progress
    is_first, average = plan.accelerator.is_main_process, model.average
    if not (is_first or plan.splits_model):
        return None
    dtype = file_dtype(options, model.dits.networks[0])
    of_run = run_metadata(plan, model.optimizer_name, model.schedule.name)
    own = {
        part: of_run | continued_sizes(model, part) | expert_metadata(plan.family, options, part)
        for part in trainable.writes
    }

    def write_file(part: str, path: Path) -> None:
        settle_all(model.dits.networks)
        with finished_weights(model.optimizer, trainable.parameters):
            trainable.writes[part](path, dtype, _metadata_now(plan, own[part]))

    def write_average(part: str, path: Path) -> None:
        assert average is not None
        with average.in_place():
            more = {} if options.metadata.no_metadata else average.metadata
            trainable.writes[part](path, dtype, _metadata_now(plan, own[part]) | more)

    card = None
    if uploads is not None and is_first:
        now, told = _metadata_now(plan, next(iter(own.values()))), [*filter(None, prompts)]
        write_card, is_lora = import_own("training.saving.hub").write_card, options.network is not None
        card = write_card(plan.names.name, is_lora, plan.family.release, now, told)

    def write_own(folder: Path) -> None:
        split = plan.splits_model
        write = import_own("training.saving.split_model").write_split_state if split else states.write_state
        write(folder, take_state(model))

    saver = Saver(
        plan.saving,
        plan.names,
        write_file,
        write_own,
        None if uploads is None else partial(uploads.publish, card=card),
        None if uploads is None else uploads.publish_state,
        None if average is None else write_average,
        is_first,
        lambda paths: note_saved(paths, progress.step),
    )
    saver.remove_leftovers()
    saver.tidy(progress.step, progress.epoch)
    return saver


def _metadata_now(plan: TrainingPlan, own: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file that is saved now. own: the entries that stay the same over the run."""
    progress, family = plan.progress, plan.family
    epoch = progress.epoch + (progress.position > 0 or progress.step == 0)
    facts, licence = family.metadata, family.release.licence
    return file_metadata(own, plan.options, facts, progress.step, epoch, datetime.now(), licence)


def file_dtype(options: TrainingOptions, dit: nn.Module) -> torch.dtype | None:
    """Return the dtype of saved models; None: every tensor as it is."""
    precision = options.saving.save_precision
    if precision is not None:
        return DTYPES[precision]
    return None if options.network is None else dtype_of(dit)


def take_state(model: TrainedModel) -> states.SavedState:
    """Return everything that resuming needs, not copied.

    Call between steps, while the training weights are loaded.
    """
    settle_all(model.dits.networks)
    plan = model.plan
    parts: dict[str, Mapping[str, Tensor]] = {
        name: module.state_dict() for name, module in model.trainable.modules.items()
    }
    if model.average is not None:
        parts[states.AVERAGE] = model.average.tensors()
    kept = optimizer_state(model.optimizer, model.trainable.names)
    for name, weight in _stepped_rows(model).items():
        values = kept["states"].get(name, {})
        rows = {key: value for key, value in values.items() if isinstance(value, Tensor) and value.ndim}
        values |= {key: as_split(weight, value) for key, value in rows.items()}
    return states.SavedState(
        Path(),
        plan.progress,
        plan.identity,
        plan.habits,
        parts,
        kept,
        model.schedule.state_dict(),
        model.scaler.state_dict(),
        None if model.average is None else {"steps": model.average.steps},
        listed_settings(plan.options, plan.saving),
    )


def restore(model: TrainedModel) -> None:
    """Bring the run into the state that its plan names. Raises CheckpointError if something does not fit."""
    saved, step = model.plan.saved, model.plan.progress.step
    if saved is None:
        if step:  # begun later
            model.schedule.go_to(step)
        return
    with states.one_error(saved.folder):
        if isinstance(saved, states.SavedState):
            _restore_own(model, saved)
            logger.info("Continuing at step %d, epoch %d.", step, model.plan.progress.epoch + 1)
        elif model.plan.splits_model:
            raise OptionError(
                f"--resume {saved.folder}: the state of another program is not split over processes. Resume "
                "it without --shard_base and save a state, which can be split"
            )
        else:
            _restore_foreign(model, saved)
    saved.release()


def _restore_foreign(model: TrainedModel, saved: states.ForeignState) -> None:
    """Restore weights, and the optimizer if it is known which of its tensors belongs to which layer."""
    module = next(iter(model.trainable.modules.values()))  # beside it may be what no file holds
    states.load_module(module, saved.network)
    if model.average is not None:
        model.average.begin()
    family = model.plan.family
    found = import_own("training.optimizers.foreign").renumber(
        saved.optimizer,
        [group["params"] for group in model.optimizer.param_groups],
        model.trainable.names,
        family.metadata.get("base_model_version", family.name),
        list(saved.network) if saved.is_ordered else (),
    )
    restored = "weights and optimizer are restored"
    if isinstance(found, str):
        restored = f"the weights alone are restored, not the state of the optimizer: {found}"
    else:
        restore_foreign_optimizer(model.optimizer, found, model.plan.accelerator.device)
    logger.warning(
        "%s was made by another program: %s. It does not record its progress: steps, epochs and the "
        "learning-rate schedule start from 0.",
        *(saved.folder, restored),
    )


def _restore_own(model: TrainedModel, saved: states.SavedState) -> None:
    if saved.files or model.plan.splits_model:
        from training.saving.split_model import fill_state

        own = {name: module.state_dict() for name, module in model.trainable.modules.items()}
        own[states.AVERAGE] = {} if model.average is None else model.average.tensors()
        fill_state(saved, own, _stepped_rows(model), model.plan.accelerator.device)
    for name, module in model.trainable.modules.items():
        states.load_module(module, saved.parts[name])
    kept, is_changed = saved.optimizer, bool(model.plan.changes)
    if is_changed:  # learning rates follow from the settings of now
        groups = [
            {**group, **{name: own[name] for name in RATES if name in own and name in group}}
            for group, own in zip(kept["groups"], model.optimizer.param_groups, strict=False)
        ]
        kept = {**kept, "groups": groups}
    restore_optimizer(model.optimizer, model.trainable.names, kept, model.plan.accelerator.device)
    if is_changed:
        model.schedule.go_to(model.plan.progress.step)
    else:
        model.schedule.load_state_dict(saved.schedule)
    if saved.scaler:
        model.scaler.load_state_dict(saved.scaler)
    if model.average is not None:
        model.average.restore(saved)


def _stepped_rows(model: TrainedModel) -> dict[str, Tensor]:
    """Return name -> split weight, if the optimizer keeps states for this process' rows only; else {}."""
    if not steps_numbers(type(model.optimizer)):
        return {}
    names = model.trainable.names
    return {names[parameter]: weight for parameter, weight in model.trainable.split.items()}
