"""Make the saver of a run: files, averages, states and the card; restore a state."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from modules.devices import DTYPES, get_compute_dtype
from modules.errors import OptionError
from runtime.offload.block_swap import write_back_all
from runtime.offload.sharding import as_sharded
from training.data.table_times import list_timestep_options
from training.experts import expert_metadata
from training.features.phases import SAVE
from training.metadata import continued_sizes_metadata, file_metadata, run_metadata
from training.optimizers.optimizer import (
    averaged_weights,
    optimizer_state,
    restore_foreign_optimizer,
    restore_optimizer,
)
from training.optimizers.stepping import is_elementwise
from training.options import TrainingOptions
from training.plan import TrainingPlan
from training.resuming import freely_changeable_settings
from training.saving import states
from training.saving.files import PublishedRun, Publisher, Saver, write_models
from training.training_run import TrainedModel

logger = logging.getLogger(__name__)

RATE_KEYS = ("lr", "initial_lr")  # keys that a schedule sets in the optimizer's groups


def _collect_metadata(model: TrainedModel) -> dict[str, dict[str, str]]:
    """Return the metadata of each saved file, by the suffix of its name: an expert, a new word, or ""."""
    plan = model.plan
    shared_metadata = run_metadata(plan, model.optimizer_name, model.schedule.name)
    # several experts are trained, or one expert of a model that has several
    has_experts = len(plan.family.experts) > 1 or len(plan.family.defaults.experts) > 1
    all_timesteps = list_timestep_options(plan.options.timesteps, plan.config.datasets) if has_experts else ()
    metadata: dict[str, dict[str, str]] = {}
    # "" is the suffix of a model without experts; all others belong to embeddings
    transformers = {"", *(expert.name for expert in plan.family.experts)}
    for name in model.trainable.written_files:
        if name in transformers:
            metadata[name] = shared_metadata | continued_sizes_metadata(model, name)
            if has_experts:
                metadata[name] |= expert_metadata(plan.family, plan.options, all_timesteps, name)
        else:  # the embedding of a new word: with `ss_network_*` its file would be mistaken for a LoRA
            metadata[name] = {
                key: text for key, text in shared_metadata.items() if not key.startswith("ss_network_")
            }
    return metadata


def make_saver(
    model: TrainedModel,
    publisher: Publisher | None,
    prompts: Sequence[str],
    log_saved: Callable[[Sequence[Path], int], None],
    on_removed: Callable[[], None],
) -> Saver | None:
    """Return the saver of the run's files, states and averages; None in processes that do not save.

    The saver calls three parties: the writer of files, the publisher that uploads them, and the log.
    Files that an earlier, killed run should have removed are removed now.

    Args:
        model: The loaded networks.
        publisher: Uploads saved files; None without uploads.
        prompts: Prompts of the samples, for the publisher.
        log_saved: Called with the files of each save, and the step.
        on_removed: Called after older files have been removed.
    """
    if not model.takes_part_in_saving:
        return None
    plan = model.plan
    progress = plan.progress
    is_main = plan.accelerator.is_main_process
    metadata = _collect_metadata(model)
    if publisher is not None and is_main:
        publisher = publisher.for_run(_describe_published_run(plan, metadata, prompts))
    writer = _ModelWriter(model, file_dtype(plan.options, model.dits.networks[0]), metadata)

    saver = Saver(
        plan.saving,
        plan.names,
        write_file=writer.write_file,
        write_state=writer.write_state,
        publisher=publisher,
        write_average=None if model.average is None else writer.write_average,
        is_main=is_main,
        write_models=plan.features.wrap(SAVE, write_models),
        log_saved=lambda paths: log_saved(paths, progress.step),
        on_removed=on_removed,
    )
    saver.remove_leftovers()
    saver.remove_expired(progress.step, progress.epoch)
    return saver


def _describe_published_run(
    plan: TrainingPlan, metadata: Mapping[str, Mapping[str, str]], prompts: Sequence[str]
) -> PublishedRun:
    """Return what the model card says about a run."""
    # One model card describes all uploaded files, so it gets the metadata of the first one.
    first_metadata = next(iter(metadata.values()))
    custom = plan.network_spec.custom
    suffix = "lora" if custom is None else custom.architecture_suffix
    return PublishedRun(
        names=plan.names,
        is_lora=plan.options.network is not None,
        release=plan.family.release,
        metadata=_metadata_now(plan, first_metadata, suffix),
        prompts=[prompt for prompt in prompts if prompt],
    )


@dataclass(frozen=True, eq=False)
class _ModelWriter:
    """Write trained weights to files, and everything needed for resuming to state folders."""

    model: TrainedModel
    dtype: torch.dtype | None  # dtype in files; None: the weights' own
    metadata: Mapping[str, Mapping[str, str]]  # metadata of each part's file, without progress and time

    def write_file(self, part: str, path: Path) -> None:
        """Write the current weights of a part of the model, such as an expert, to a file."""
        model = self.model
        write_back_all(model.dits.networks)
        written = model.trainable.written_files[part]
        with averaged_weights(model.optimizer, model.trainable.parameters):
            written.write(path, self.dtype, _metadata_now(model.plan, self.metadata[part], written.ending))

    def write_average(self, part: str, path: Path) -> None:
        """Write the moving average (EMA) of the weights of a part of the model to a file."""
        model = self.model
        average = model.average
        assert average is not None
        written = model.trainable.written_files[part]
        with average.in_place():
            average_metadata = {} if model.options.metadata.no_metadata else average.metadata
            file_metadata = _metadata_now(model.plan, self.metadata[part], written.ending)
            written.write(path, self.dtype, file_metadata | average_metadata)

    def write_state(self, folder: Path) -> None:
        """Write the state of the run after the current step."""
        if self.model.plan.shards_model:
            from training.saving.split_model import write_sharded_state  # only if it is split

            write_sharded_state(folder, collect_state(self.model))
        else:
            states.write_state(folder, collect_state(self.model))


def _metadata_now(
    plan: TrainingPlan, fixed_metadata: Mapping[str, str], architecture_suffix: str
) -> dict[str, str]:
    """Return the metadata of a file that is saved now, with the step, the epoch and the time."""
    progress, family = plan.progress, plan.family
    # at position 0 an epoch has just ended, except in a new run
    is_within_epoch = progress.position > 0 or progress.step == 0
    num_begun_epochs = progress.epoch + is_within_epoch
    feature_metadata: dict[str, str] = {}
    if not plan.options.metadata.no_metadata:
        feature_metadata = {f"ss_{name}": str(value) for name, value in plan.features.info.in_files.items()}
    return file_metadata(
        {**fixed_metadata, **feature_metadata},
        plan.options,
        family.metadata,
        step=progress.step,
        epoch=num_begun_epochs,
        now=datetime.now(),
        licence=family.release.licence if family.release.covers_all else None,
        tables=plan.config.datasets,
        architecture_suffix=architecture_suffix,
    )


def file_dtype(options: TrainingOptions, dit: nn.Module) -> torch.dtype | None:
    """Return the dtype of saved models; None if every tensor keeps its dtype."""
    precision = options.saving.save_precision
    if precision is not None:
        return DTYPES[precision]
    return None if options.network is None else get_compute_dtype(dit)


def collect_state(model: TrainedModel) -> states.SavedState:
    """Return the state to save for resuming; its tensors are the run's own, not copies.

    Call this between steps, while the networks contain the training weights and not their average.
    """
    write_back_all(model.dits.networks)  # swapped blocks get their weights back
    plan = model.plan
    parts: dict[str, Mapping[str, Tensor]] = {
        name: module.state_dict() for name, module in model.trainable.modules.items()
    }
    if model.average is not None:
        parts[states.AVERAGE] = model.average.tensors()
    optimizer = optimizer_state(model.optimizer, model.trainable.names)
    # moments of sharded weights contain only this process's rows: they are replaced by sharded tensors
    for name, sharded_weight in _sharded_weights_with_local_moments(model).items():
        if name in optimizer["states"]:
            # step counters have no dimensions
            optimizer["states"][name] = {
                # step counters have no dimensions
                key: as_sharded(sharded_weight, value)
                if isinstance(value, Tensor) and value.ndim > 0
                else value
                for key, value in (optimizer["states"][name]).items()
            }
    return states.SavedState(
        folder=Path(),  # not recorded in a state
        progress=plan.progress,
        # in a state, settings that must stay the same are `identity`, and those that may change are `habits`
        identity=plan.settings.fixed,
        habits=plan.settings.adjustable,
        parts=parts,
        optimizer=optimizer,
        schedule=model.schedule.state_dict(),
        scaler=model.scaler.state_dict(),
        average=None if model.average is None else {"steps": model.average.steps},
        settings=freely_changeable_settings(plan.options, plan.saving),
    )


def restore(model: TrainedModel) -> None:
    """Restore the state of --resume, if there is one.

    Raises:
        CheckpointError: If the state does not fit this run.
    """
    saved, step = model.plan.saved, model.plan.progress.step
    if saved is None:
        starts_in_the_middle = step > 0
        if starts_in_the_middle:
            model.schedule.go_to(step)
        return
    with states.errors_name_the_state(saved.folder):
        if isinstance(saved, states.SavedState):
            restore_state(model, saved, with_changes=bool(model.plan.changes))
        elif model.plan.shards_model:
            raise OptionError(
                f"--resume {saved.folder}: the state of another program is not split over processes. Resume "
                f"it without {model.plan.options.speed.modes.splits_weights} and save a state, which can be "
                "split"
            )
        else:
            _restore_foreign(model, saved)
    saved.release()


def restore_state(model: TrainedModel, saved: states.SavedState, with_changes: bool = False) -> None:
    """Restore a state that this program saved: weights, optimizer, schedule, loss scaler and average.

    Args:
        model: The loaded networks.
        saved: The state.
        with_changes: Whether the learning rates and the schedule of this run replace those of the state.

    Raises:
        CheckpointError: If the state does not fit this run.
    """
    with states.errors_name_the_state(saved.folder):
        if saved.files or model.plan.shards_model:
            # Load a state's sharded tensors in place into those of this run; the state refers to them
            # afterwards
            from training.saving.split_model import load_sharded_tensors  # only with split tensors

            parts = {name: module.state_dict() for name, module in model.trainable.modules.items()}
            parts[states.AVERAGE] = {} if model.average is None else model.average.tensors()
            device = model.plan.accelerator.device
            load_sharded_tensors(saved, parts, _sharded_weights_with_local_moments(model), device)
        for name, module in model.trainable.modules.items():
            states.load_module(module, saved.parts[name])
        _restore_optimizer_and_schedule(model, saved, with_changes)
        if saved.scaler:
            model.scaler.load_state_dict(saved.scaler)
        if model.average is not None:
            model.average.restore(saved)
    progress = model.plan.progress
    logger.info("Continuing at step %d, epoch %d.", progress.step, progress.epoch + 1)


def _restore_foreign(model: TrainedModel, saved: states.ForeignState) -> None:
    """Restore weights, and the optimizer's state if its tensors can be assigned to layers."""
    # states of other programs contain only the network, which is the first module
    module = next(iter(model.trainable.modules.values()))
    states.load_module(module, saved.network)
    if model.average is not None:
        model.average.begin()  # the state has no average: start again from the restored weights
    family = model.plan.family
    from training.optimizers.foreign import RenumberingError, renumber  # only for another program's states

    try:
        renumbered = renumber(
            saved.optimizer,
            [group["params"] for group in model.optimizer.param_groups],
            model.trainable.names,
            version=family.metadata.get("base_model_version", family.name),
            tensor_order=list(saved.network) if saved.is_ordered else (),
        )
    except RenumberingError as error:
        restored = f"the weights alone are restored, not the state of the optimizer: {error}"
    else:
        restore_foreign_optimizer(model.optimizer, renumbered, model.plan.accelerator.device)
        restored = "weights and optimizer are restored"
    logger.warning(
        "%s was made by another program: %s. It does not record its progress: steps, epochs and the "
        "learning-rate schedule start from 0.",
        saved.folder,
        restored,
    )


def _restore_optimizer_and_schedule(
    model: TrainedModel, saved: states.SavedState, with_changes: bool
) -> None:
    """Restore the optimizer's states and the schedule."""
    # With --resume_changed, the learning rates and the schedule of this run replace those of the state.
    plan, full_dit = model.plan, model.plan.options.full_dit
    device = plan.accelerator.device
    if full_dit is not None and full_dit.offloads_states:  # --offload_optimizer_device
        device = torch.device("cpu")
    if not with_changes:
        restore_optimizer(model.optimizer, model.trainable.names, saved.optimizer, device)
        model.schedule.load_state_dict(saved.schedule)
        return
    # The optimizer's saved parameter groups with the learning rates of the current settings
    saved_groups = saved.optimizer["groups"]
    merged = []
    for saved_group, group in zip(saved_groups, model.optimizer.param_groups, strict=False):
        rates = {name: group[name] for name in RATE_KEYS if name in group and name in saved_group}
        merged.append({**saved_group, **rates})
    groups = merged
    optimizer_state = {**saved.optimizer, "groups": groups}
    restore_optimizer(model.optimizer, model.trainable.names, optimizer_state, device)
    model.schedule.go_to(plan.progress.step)


def _sharded_weights_with_local_moments(model: TrainedModel) -> dict[str, Tensor]:
    """Return the sharded weights whose optimizer states contain only this process's rows, by name."""
    # Empty if no weight is sharded, or if the optimizer needs whole weights.
    if not is_elementwise(type(model.optimizer)):
        return {}
    names = model.trainable.names
    return {names[parameter]: weight for parameter, weight in model.trainable.sharded_weights.items()}
