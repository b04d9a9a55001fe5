"""Find all that a run is made of before anything large is loaded: options, processes, state, items, steps."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dataset.batches.checks import SameEncoders, check_channels
from dataset.batches.finding import find_items, learn_no_references, require_items
from dataset.batches.items import CachingCommands, TrainingItem
from dataset.batches.order import BatchOrder, split_validation
from dataset.cache.store import Stores, npz_names
from dataset.config import DatasetConfig, for_family, load_dataset_config
from dataset.sources.media_source import NO_REFERENCE
from dataset.subsets import folders_config
from modules.contract.family import Family, sound_of
from modules.dressing import have_joined
from modules.errors import DatasetError, OptionError, OutputError
from modules.installation import import_own
from modules.option_values import require
from modules.speed_options import Quantisation
from networks.formats import LoraFormat
from training.checks import check_before_loading, check_teacher, choose_lora_format, list_unused_options
from training.data.feed import BatchSources
from training.data.live import LiveTexts
from training.experts import check_computing, note_experts
from training.optimizers.stepping import check_fused_backward, check_split
from training.options import TrainingOptions
from training.processes import make_accelerator
from training.reports.logs import check_trackers
from training.resuming import check_resumable, find_state, first_progress, settings_of, take_over
from training.run_options import StartOptions
from training.saving.files import Names, hold_name
from training.saving.options import SavingOptions
from training.saving.states import ForeignState, SavedState
from training.steps import Progress, StepPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingPlan:
    """Hold all facts of a run before it loads a network. Only `progress` changes while it trains."""

    family: Family
    options: TrainingOptions  # as given; --blocks_to_swap may be auto
    sampled: Family  # the model that samples are made with: may have transformers that are not trained
    commands: CachingCommands
    accelerator: Accelerator
    quantisation: Quantisation | None  # with what multiplies on the device
    saved: SavedState | ForeignState | None
    progress: Progress
    names: Names  # of the run's files
    saving: SavingOptions  # with the epochs of --save_n_epoch_ratio
    network_module: str  # empty if the model itself is trained
    lora_format: LoraFormat | None  # of its files; None: they have the names of what is trained
    config: DatasetConfig
    training: Sequence[TrainingItem]
    validation: Sequence[TrainingItem]
    order: BatchOrder
    steps: StepPlan
    sources: BatchSources  # where batches are read from
    encoders: SameEncoders  # that made the caches
    texts: LiveTexts | None  # encoded while training; None: all come from caches
    # settings that states record, and changes by --resume_changed
    identity: dict[str, Any]
    habits: dict[str, Any]
    changes: Mapping[str, str]

    @property
    def splits_model(self) -> bool:
        return self.options.whole_dit is not None and self.options.speed.sharding.shard_base and have_joined()


def make_plan(
    family: Family,
    options: TrainingOptions,
    commands: CachingCommands,
    config: DatasetConfig,
    accelerator: Accelerator,
    sampling: Family | None = None,
) -> TrainingPlan:
    """Find state, items and steps; check what can be known before loading. sampling: see `train_network`."""
    is_main, device, saving = accelerator.is_main_process, accelerator.device, options.saving
    saved = None if saving.resume is None else find_state(options, saving.resume, is_main)
    progress = first_progress(options, saved)
    quantisation = check_computing(family, options, device)
    if options.caching is not None:  # before minutes of encoding
        check_before_loading(family, options, options.loop.known_steps, sampling)
    texts = _find_texts(family, options, config)
    lora_format = choose_lora_format(family, options, () if texts is None else texts.learning)
    sources = _find_sources(family, options, config, device, texts)
    process, seed = (accelerator.process_index, accelerator.num_processes), progress.seed
    training, validation = _find_items(family, options, config, sources, texts, commands, seed, process)
    order = BatchOrder(training, seed)
    steps = _plan_steps(options, order, process[1], progress)
    check_before_loading(family, options, steps.total_steps, sampling)
    if is_main:
        note_experts(family, options, sampling is not None)
    module = "" if options.network is None else options.network.network_module or family.lora_module
    identity, habits = settings_of(family, options, seed, order, steps, module)
    if saving.save_n_epoch_ratio is not None:
        saving = saving.spread(steps.num_epochs, saving.save_n_epoch_ratio)
    changes = {} if saved is None else check_resumable(saved, identity, habits, options, saving)
    if changes and isinstance(saved, SavedState):
        take_over(changes, progress, saved)
        steps = _plan_steps(options, order, process[1], progress)  # they may begin anew
    if options.start is not None and options.start.is_given:
        begin_later(options.start, progress, steps, saved is not None)
    return TrainingPlan(
        family=family,
        options=options,
        sampled=sampling or family,
        commands=commands,
        accelerator=accelerator,
        quantisation=quantisation,
        saved=saved,
        progress=progress,
        names=_names_of(family, options),
        saving=saving,
        network_module=module,
        lora_format=lora_format,
        config=config,
        training=training,
        validation=validation,
        order=order,
        steps=steps,
        sources=sources,
        encoders=SameEncoders(commands),
        texts=texts,
        identity=identity,
        habits=habits,
        changes=changes,
    )


def _names_of(family: Family, options: TrainingOptions) -> Names:
    """Return the names of the run's files: one for each expert, if each has a LoRA of its own."""
    parts = tuple(expert.name for expert in family.experts) if options.by_expert.lora_per_expert else ()
    return Names(*options.saving.place, parts)


def _may_encode(options: TrainingOptions, config: DatasetConfig) -> bool:
    """Return whether the training may encode pictures or captions by itself."""
    subsets = [one for one in config.datasets if one.group is not None]
    is_changing = any(one.changes.varying_keys or one.augmentation.varying_keys for one in subsets)
    return is_changing or options.is_for_images or options.caching is not None


def _find_texts(family: Family, options: TrainingOptions, config: DatasetConfig) -> LiveTexts | None:
    """Return the text encoders that work while training. Checks --teacher."""
    texts: LiveTexts | None = None
    if _may_encode(options, config):
        texts = import_own("training.caching_inside").find_live_texts(family, options, config)
    if options.frozen.teacher is not None:
        check_teacher(family, options.frozen.teacher, texts)
    return texts


def _find_sources(
    family: Family,
    options: TrainingOptions,
    config: DatasetConfig,
    device: torch.device,
    texts: LiveTexts | None,
) -> BatchSources:
    """Return where the parts of batches are read from that `texts` does not encode."""
    if not _may_encode(options, config):
        return BatchSources(Stores(npz_names(family)))
    keys = () if texts is None else texts.keys
    prepare = import_own("training.caching_inside").prepare_sources
    return prepare(family, config, options.caching, device, keys)


@contextmanager
def join_processes(family: Family, options: TrainingOptions) -> Iterator[tuple[Accelerator, Any]]:
    """Start trackers and processes, and check the options against the device.

    Yields the accelerator, and `OtherProcesses`, which is None for a single process.

    During the block no other run can take the name of this one, and the processes watch each other.
    """
    check_trackers(options.logs)
    accelerator = make_accelerator(options.accelerator, options.logs)
    if options.speed.sharding.shard_base and accelerator.num_processes == 1:
        logger.warning(
            "--shard_base has no effect with one process, which holds the whole model. Use accelerate launch "
            "--multi_gpu --num_processes N"
        )
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.WARNING)  # only one process logs what all do
    else:
        takes_guidance = family.defaults.embedded_guidance is not None
        for line in list_unused_options(options, takes_guidance, family.noise.table_is_shifted):
            logger.warning(line)
    if options.is_fused:
        check_fused_backward(options.optimizer.optimizer_type, accelerator.num_processes)
    if options.whole_dit is not None and options.speed.sharding.shard_base and have_joined():
        check_split(options.optimizer.optimizer_type)
    compilation = options.speed.compilation.choice
    if compilation is not None:
        import_own("modules.compile").check_compilation(compilation, accelerator.device)
    with ExitStack() as held:
        others = None
        if accelerator.num_processes > 1:
            watch = import_own("modules.lost_processes").OtherProcesses
            others = held.enter_context(watch(accelerator.process_index, accelerator.num_processes))
            held.enter_context(others.explain())
        # the main process reserves the name; if that fails, it reports the error, and all end
        error: OutputError | None = None
        if accelerator.is_main_process:
            try:
                held.enter_context(hold_name(*options.saving.place))
            except OutputError as refusal:
                error = refusal
        (code,) = broadcast_object_list([None if error is None else error.exit_code])
        if error is not None:
            raise error
        if code is not None:
            raise SystemExit(code)
        yield accelerator, others


def read_config(options: TrainingOptions, family: Family) -> DatasetConfig:
    """Read the data of a training: --dataset_config, or --train_data_dir and its companions."""
    path, given = options.loop.dataset_config, options.subset
    latent = family.latent
    of_family = family.references, latent.frame_step, latent.in_sections, family.can.references
    if given is not None and given.replaces_toml:
        if path is None:
            return for_family(folders_config(given), *of_family)
        logger.warning("--train_data_dir is ignored because --dataset_config %s describes the data", path)
    path = require(path, "--dataset_config", "the clips to train on")
    return for_family(load_dataset_config(path, given), *of_family)


def _find_items(
    family: Family,
    options: TrainingOptions,
    config: DatasetConfig,
    sources: BatchSources,
    texts: LiveTexts | None,
    commands: CachingCommands,
    seed: int,
    process: tuple[int, int],
) -> tuple[Sequence[TrainingItem], Sequence[TrainingItem]]:
    """Find the caches by their names; return the items to train on and those to validate on.

    process: number of this one and of all. Raises CacheError with the caching commands if there are none.
    """
    family.check_given_files()  # first: caches are made with them
    parts = family.cache_tag, family.latent, family.text_keys
    where = sources.stores, sources.tables, sound_of(family)
    listed = find_items(config, *parts, *where)
    found = require_items(listed, commands)
    check_channels(found, family.latent, commands, sources.stores)
    starting = import_own("dataset.batches.starting")
    starting.check_caches(family, found, commands, sources.stores, texts is not None, process)
    if process[0] == 0:
        hears = sound_of(family) is not None
        starting.compare_sources(config.datasets, listed, commands, family.cache_tag, hears)
    preserving = next((table for table in config.datasets if table.preserves_output), None)
    if preserving is not None and options.network is None:
        raise OptionError(
            f"{preserving.name}: diff_output_preservation compares a LoRA with the model without it, and "
            "here the model itself is trained. Leave it out"
        )
    asked = options.validation
    seed = seed if asked.validation_seed is None else asked.validation_seed
    training, validation = split_validation(found, asked.validation_split, seed)
    if not training:
        raise DatasetError(
            f"{config.path}: all {len(found)} items are for validation. Leave at least one table without "
            "`validation = true`."
        )
    if not validation and asked.validate_every_n_steps is not None:
        raise OptionError(
            "--validate_every_n_steps has nothing to validate on: give --validation_split, or `validation = "
            "true` in a table"
        )
    takes = process[0] == 0 and any(table.references or table.clip_references for table in config.datasets)
    if takes and learn_no_references([*training, *validation], sources.stores):
        logger.warning("%s", NO_REFERENCE)
    takes_masks = process[0] == 0 and options.subset is not None and options.subset.masked_loss
    if takes_masks and not any(table.mask_directory or table.alpha_mask for table in config.datasets):
        logger.warning(
            "--masked_loss has no effect: no subset has masks (conditioning_data_dir, or alpha_mask = true)"
        )
    return training, validation


def _plan_steps(options: TrainingOptions, order: BatchOrder, processes: int, progress: Progress) -> StepPlan:
    """Plan the steps of the run; epochs, if given, replace steps."""
    loop, sharding = options.loop, options.speed.sharding
    steps = StepPlan(
        num_batches=order.num_batches,
        processes=sharding.groups_of(processes),
        peers=sharding.context_parallel,
        accumulation=loop.gradient_accumulation_steps,
        in_lockstep=sharding.shard_base and processes > 1,
        total_steps=loop.max_train_steps,
        first_epoch=progress.plan_epoch,
        first_position=progress.plan_position,
        first_step=progress.plan_step,
    )
    if loop.max_train_epochs is None:
        return steps
    return replace(steps, total_steps=steps.steps_until(loop.max_train_epochs))


def begin_later(options: StartOptions, progress: Progress, plan: StepPlan, is_resumed: bool) -> None:
    """Put a new run's progress to the step where it begins.

    is_resumed: a saved state says where to go on instead. Raises OptionError if the run has no such step.
    """
    given = "--initial_step" if options.initial_epoch is None else "--initial_epoch"
    if is_resumed:
        logger.info("%s is ignored because --resume goes on where the state was saved.", given)
        return
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
