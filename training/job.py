"""What a training run finds before anything large is loaded: options, processes, state, items."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dataset.batches.finding import (
    CachingCommands,
    find_items,
    require_items,
)
from dataset.batches.items import TrainingItem
from dataset.batches.latent_space import check_channels
from dataset.batches.order import BatchOrder
from dataset.batches.same_encoders import SameEncoders
from dataset.batches.validation_split import split_validation
from dataset.config import DatasetConfig, load_dataset_config
from dataset.subsets.folders import folders_config
from modules.compile import check_compilation
from modules.contract.family import Family
from modules.errors import DatasetError, OptionError, OutputError
from modules.fp8.options import Quantisation
from modules.fp8.products import add_product
from modules.option_values import require
from training.data.live_media import BatchSources
from training.data.live_text import LiveTexts
from training.optimizers.fused_backward import check_fused_backward
from training.options import TrainingOptions
from training.processes.accelerator import make_accelerator
from training.progress import Progress
from training.reports.logs import check_trackers, run_folder
from training.resuming import (
    find_state,
    first_progress,
)
from training.saving.earlier import hold_name
from training.saving.files import Names
from training.saving.options import SavingOptions
from training.saving.states import ForeignState, SavedState
from training.steps import StepPlan
from training.unused_options import list_unused_options

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingJob:
    """Hold what everything below is built from."""

    family: Family
    options: TrainingOptions
    commands: CachingCommands
    accelerator: Accelerator
    fp8: Quantisation | None  # with what multiplies on the device
    saved: SavedState | ForeignState | None
    progress: Progress
    sampling: Family | None = None  # the model of samples, if it has transformers that are not trained

    @property
    def sampled(self) -> Family:
        """Return the model that samples are made with."""
        return self.sampling or self.family

    @property
    def output_dir(self) -> Path:
        return self.options.saving.place[0]

    @property
    def output_name(self) -> str:
        return self.options.saving.place[1]

    @property
    def names(self) -> Names:
        """Return the names of what the run saves."""
        apart = self.options.by_expert.lora_per_expert
        parts = tuple(expert.name for expert in self.family.experts) if apart else ()
        return Names(self.output_dir, self.output_name, parts)

    @property
    def network_module(self) -> str:
        network = self.options.network
        return "" if network is None else network.network_module or self.family.lora_module


@dataclass(frozen=True)
class Data:
    """Hold the items that a run trains and validates on, and the plan of its steps."""

    config: DatasetConfig
    training: Sequence[TrainingItem]
    order: BatchOrder
    validation: Sequence[TrainingItem]
    plan: StepPlan
    encoders: SameEncoders
    sources: BatchSources = field(default_factory=BatchSources)  # where batches are read from
    texts: LiveTexts | None = None  # encoded while training


def start_job(
    family: Family,
    options: TrainingOptions,
    commands: CachingCommands,
    held: ExitStack,
    sampling: Family | None = None,
) -> TrainingJob:
    """Join the processes and find where to begin. held: until it is closed, no other run has its name."""
    check_trackers(options.logs)
    accelerator = make_accelerator(
        options.accelerator, options.logs.trackers, run_folder(options.logs, datetime.now())
    )
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.WARNING)  # one process tells what all do
    else:
        takes_guidance = family.defaults.embedded_guidance is not None
        for line in list_unused_options(options, takes_guidance, family.noise.table_is_shifted):
            logger.warning(line)
    if options.is_fused:
        check_fused_backward(options.optimizer.optimizer_type, accelerator.num_processes)
    fp8 = add_product(options.speed.fp8.quantisation, accelerator.device)
    check_compilation(options.speed.compilation.choice, accelerator.device)
    _hold_name(options.saving, accelerator.is_main_process, held)
    saved = find_state(options, accelerator.is_main_process)
    progress = first_progress(options, saved)
    return TrainingJob(family, options, commands, accelerator, fp8, saved, progress, sampling)


def _hold_name(saving: SavingOptions, is_main_process: bool, held: ExitStack) -> None:
    """Hold the name of the run in the main process. If it cannot be had, that one tells, and all end."""
    error: OutputError | None = None
    if is_main_process:
        try:
            held.enter_context(hold_name(*saving.place))
        except OutputError as refusal:
            error = refusal
    (code,) = broadcast_object_list([None if error is None else error.exit_code])
    if error is not None:
        raise error
    if code is not None:
        raise SystemExit(code)


def read_config(options: TrainingOptions) -> DatasetConfig:
    """Read the data of a training: --dataset_config, or what --train_data_dir and its companions say."""
    path, given = options.loop.dataset_config, options.subset
    if given is not None and given.replaces_toml:
        if path is None:
            return folders_config(given)
        logger.warning("--train_data_dir is ignored because --dataset_config %s describes the data", path)
    return load_dataset_config(require(path, "--dataset_config", "the clips to train on"), given)


def find_data(
    job: TrainingJob, config: DatasetConfig, sources: BatchSources, texts: LiveTexts | None = None
) -> Data:
    """Find the caches by their names and plan the steps. sources: where batches are read from. texts:
    encoded while training.

    Raises CacheError with the caching commands if there are none.
    """
    family, asked = job.family, job.options.validation
    family.check_given_files()  # first: caches are made with them
    parts = family.cache_tag, family.latent, family.text_keys
    found = require_items(find_items(config, *parts, sources.stores, sources.tables), job.commands)
    check_channels(found, family.latent, job.commands, sources.stores)
    preserving = next((table for table in config.datasets if table.preserves_output), None)
    if preserving is not None and job.options.network is None:
        raise OptionError(
            f"{preserving.name}: diff_output_preservation compares a LoRA with the model without it, and "
            "here the model itself is trained. Leave it out"
        )
    if job.accelerator.is_main_process:
        _warn_of_no_masks(job.options, config)
    seed = job.progress.seed if asked.validation_seed is None else asked.validation_seed
    training, validation = split_validation(found, asked.validation_split, seed)
    if not training:
        raise DatasetError(
            f"{config.path}: all {len(found)} items are for validation. Leave at least one table without "
            "`validation = true`."
        )
    if not validation and job.options.validation.validate_every_n_steps is not None:
        raise OptionError(
            "--validate_every_n_steps has nothing to validate on: give --validation_split, or `validation = "
            "true` in a table"
        )
    order = BatchOrder(training, job.progress.seed)
    plan = plan_steps(job, order)
    encoders = SameEncoders(job.commands)
    return Data(config, training, order, validation, plan, encoders, sources, texts)


def _warn_of_no_masks(options: TrainingOptions, config: DatasetConfig) -> None:
    """Say that --masked_loss has no effect if no table has masks."""
    is_asked = options.subset is not None and options.subset.masked_loss
    if is_asked and not any(table.mask_directory or table.alpha_mask for table in config.datasets):
        logger.warning(
            "--masked_loss has no effect: no subset has masks (conditioning_data_dir, or alpha_mask = true)"
        )


def plan_steps(job: TrainingJob, order: BatchOrder) -> StepPlan:
    """Plan the steps of the run; epochs, if given, replace steps."""
    loop, progress = job.options.loop, job.progress
    plan = StepPlan(
        num_batches=order.num_batches,
        processes=job.accelerator.num_processes,
        accumulation=loop.gradient_accumulation_steps,
        total_steps=loop.max_train_steps,
        first_epoch=progress.plan_epoch,
        first_position=progress.plan_position,
        first_step=progress.plan_step,
    )
    if loop.max_train_epochs is None:
        return plan
    return replace(plan, total_steps=plan.steps_until(loop.max_train_epochs))
