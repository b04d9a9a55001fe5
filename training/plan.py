"""Plan a run before anything large is loaded: its options, processes, resumed state, items and steps."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dataset.batches.checks import SameEncoders, check_channels
from dataset.batches.finding import find_items, lack_edit_references, require_items
from dataset.batches.items import CachingCommands, TrainingItem
from dataset.batches.order import BatchOrder, split_validation
from dataset.batches.starting import check_caches, compare_sources
from dataset.cache.store import Stores, npz_names
from dataset.config import DatasetConfig, for_family, load_dataset_config, with_empty_prompts
from dataset.sources.media_source import NO_REFERENCE
from dataset.subsets import folders_config
from modules.errors import DatasetError, OptionError, OutputError
from modules.lost_processes import OtherProcesses
from modules.option_values import require
from modules.speed_options import Quantization
from networks.lora_format import LoraFormat
from protocols.family import Family, brings_empty_text, get_audio_spec
from protocols.full_model import trains_checkpoint
from runtime.offload.joining import have_joined
from runtime.ways.composing import count_groups, warn_if_alone
from training.checks import (
    check_before_loading,
    check_schedule,
    list_unused_options,
    select_lora_format,
)
from training.data.feed import BatchSources
from training.data.live import LiveTextEncoders
from training.data.table_times import check_timesteps, list_timestep_options, timestep_options_by_group
from training.experts import check_computing, get_network_module, log_experts
from training.features.composing import begin_run
from training.features.contract import EMPTY_PROMPT, LIVE_TEXTS, REJECTED_ONES
from training.features.hooks import RunFeatures
from training.learner import NetworkSpec, check_data
from training.learning_options import PLATEAU, PRESERVE_OUTPUT
from training.noise_options import TimestepOptions
from training.optimizers.stepping import check_fused_backward, check_offload, check_sharded_optimizer
from training.options import TrainingOptions
from training.other_models import NO_OTHERS, OtherFamilies
from training.processes import make_accelerator
from training.resuming import (
    RunSettings,
    apply_changes,
    check_resumable,
    collect_run_settings,
    describe_adapter,
    find_state,
    initial_progress,
)
from training.run_options import StartOptions
from training.saving.files import SAFETENSORS, Names, reserve_name
from training.saving.options import SavingOptions
from training.saving.states import ForeignState, SavedState
from training.steps import Progress, StepPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingPlan:
    """Options, data and step counts of a run before networks are loaded; only `progress` changes later."""

    family: Family
    options: TrainingOptions  # as given; --blocks_to_swap may be auto
    features: RunFeatures  # what the active features contribute
    network_spec: NetworkSpec
    network_module: str  # as in --network_module; empty if the model itself is trained
    names: Names  # names of the saved files
    other_families: OtherFamilies
    accelerator: Accelerator
    quantization: Quantization | None  # including which matrix products the device supports
    saved: SavedState | ForeignState | None
    progress: Progress
    saving: SavingOptions  # with the epochs of --save_n_epoch_ratio
    lora_format: LoraFormat | None  # None: saved tensors keep the names of the trained parameters
    config: DatasetConfig
    training: Sequence[TrainingItem]
    validation: Sequence[TrainingItem]
    order: BatchOrder
    steps: StepPlan
    table_times: Mapping[int, TimestepOptions]  # by the group of tables with equal timestep options
    sources: BatchSources  # where batches are read from
    live_encoders: LiveTextEncoders | None  # encoded while training; None: all come from caches
    changes: Mapping[str, str]  # settings that --resume_changed allows to differ from the state
    adapter: str | None  # --training_adapter with a hash of its content at the start of the run

    @cached_property
    def settings(self) -> RunSettings:
        """Settings recorded in states; computed on first access, because a run may save no state."""
        return collect_run_settings(
            self.family,
            self.options,
            seed=self.progress.seed,
            order=self.order,
            plan=self.steps,
            adapter=self.adapter,
        )

    @property
    def sample_family(self) -> Family:
        """Return the model that generates samples; some of its transformers may not be trained."""
        return self.other_families.sampling or self.family

    @property
    def shards_model(self) -> bool:
        """Whether a trained transformer is sharded over the processes."""
        return shards_full_model(self.options)


def _name_files(family: Family, options: TrainingOptions, features: RunFeatures) -> Names:
    """Return the names of the run's files: one per expert if each has its own LoRA."""
    folder, name = options.saving.folder_and_name
    expert_names: tuple[str, ...] = ()
    if options.by_expert.lora_per_expert:
        expert_names = tuple(expert.name for expert in family.experts)
    saves_folders = options.full_dit is not None and options.full_dit.saves_folders
    return Names(
        folder,
        name,
        expert_names,
        suffix="" if saves_folders else SAFETENSORS,
        embedding_words=tuple(features.embedding_words),
    )


def shards_full_model(options: TrainingOptions) -> bool:
    """Return whether the full model is trained and sharded over the processes."""
    return options.full_dit is not None and bool(options.speed.modes.splits_weights) and have_joined()


@dataclass(frozen=True)
class RunPlanner:
    """Plans a run from its options and its dataset, before networks are loaded."""

    family: Family
    options: TrainingOptions
    commands: CachingCommands  # for messages
    network_spec: NetworkSpec  # what the run trains: a kind of network, or the whole DiT
    config: DatasetConfig  # the dataset, as read from its file
    accelerator: Accelerator
    others: OtherFamilies = NO_OTHERS  # other models, such as transformers that only samples use

    def plan(self) -> TrainingPlan:
        """Plan the run, and check all that is possible before networks are loaded.

        1. Find the saved state, and check the options.
        2. Determine what the features and the text encoders that run during training need.
        3. Find or make the caches, list the items, and derive the order of batches and the steps.
        4. Compare the plan with the saved state.
        """
        family, options, config = self.family, self.options, self.config
        saving = options.saving
        saved: SavedState | ForeignState | None = None
        if saving.resume is not None:
            saved = find_state(options, saving.resume, self.accelerator.is_main_process)
        progress = initial_progress(options, saved)
        quantization = check_computing(family, options, self.accelerator.device)
        # early: encoding the dataset may take minutes
        check_before_loading(family, options, self.network_spec, self.others)
        features = begin_run(options, family, config.datasets)
        if options.network is None:
            _check_tables(config)  # a whole model takes no table with keys for a network
        if family.abilities.one_sample:
            _check_batch_sizes(family.abilities.one_sample, config)
        live_encoders: LiveTextEncoders | None = None  # None: all their outputs are cached
        if self.may_encode:
            from training.caching_inside import find_live_encoders  # most runs only read caches

            live_encoders = find_live_encoders(family, options, config)
        for check_texts in features.on.on_text_encoders:
            check_texts(live_encoders)
        lora_format = select_lora_format(
            family,
            self.network_spec.lora_options,
            () if live_encoders is None else live_encoders.learning_encoders,
        )
        sources = self._find_sources(features, live_encoders)
        training, validation = self._split_items(
            self._find_items(
                sources,
                encodes_texts_on_the_fly=live_encoders is not None,
                condition_set=features.condition_set,
            ),
            progress.seed,
        )
        self._warn_of_mismatched_data(features, training, validation, sources.stores)
        order = BatchOrder(training, progress.seed)
        steps = _plan_steps(options, order, self.accelerator.num_processes, progress)
        if options.loop.known_steps is None:
            check_schedule(options, steps.total_steps)
        if self.accelerator.is_main_process:
            log_experts(
                family,
                options,
                list_timestep_options(options.timesteps, config.datasets),
                has_sample_only_networks=self.others.sampling is not None,
            )
        adapter = None
        if options.frozen.training_adapter is not None:
            adapter = describe_adapter(
                options.frozen.training_adapter,
                options.frozen.training_adapter_multiplier,
                with_content=True,
            )
        if saving.save_n_epoch_ratio is not None:
            saving = saving.with_epochs_between_saves(steps.num_epochs, saving.save_n_epoch_ratio)
        plan = TrainingPlan(
            family=family,
            options=options,
            features=features,
            network_spec=self.network_spec,
            network_module=get_network_module(family, options),
            names=_name_files(family, options, features),
            other_families=self.others,
            accelerator=self.accelerator,
            quantization=quantization,
            saved=saved,
            progress=progress,
            saving=saving,
            lora_format=lora_format,
            config=config,
            training=training,
            validation=validation,
            order=order,
            steps=steps,
            table_times=timestep_options_by_group(options.timesteps, config.datasets),
            sources=sources,
            live_encoders=live_encoders,
            changes={},
            adapter=adapter,
        )
        # a state or --initial_step moves the progress of this plan
        if saved is not None:
            plan = _compare_with_state(plan, saved)
        if options.start is not None and options.start.is_given:
            skip_to_initial_step(options.start, progress, plan.steps, saved is not None)
        return plan

    @cached_property
    def may_encode(self) -> bool:
        """Whether the run may encode images or captions itself, instead of only reading caches."""
        if self.options.is_for_images or self.options.caching is not None:
            return True
        if LIVE_TEXTS in self.options.features.needs:
            return True
        subsets = [table for table in self.config.datasets if table.group is not None]
        return any(
            table.captions.changes.varying_keys or table.buckets.augmentation.varying_keys
            for table in subsets
        )

    def _find_sources(self, features: RunFeatures, live_encoders: LiveTextEncoders | None) -> BatchSources:
        """Return where batches are read from, except for the text tensors that `live_encoders` encode."""
        # If the run may encode, it may also write caches, or encode images and captions during training.
        if self.may_encode:
            from training.caching_inside import prepare_sources  # most runs only read caches

            sources = prepare_sources(
                self.family,
                self.config,
                self.options.caching,
                device=self.accelerator.device,
                live_encoders=live_encoders,
                commands=self.commands,
                needs=features.needs,
                on_media=features.on.media,
            )
        else:
            # `SameEncoders` warns if caches were made with different encoders
            sources = BatchSources(
                self.family.latent, SameEncoders(self.commands), stores=Stores(npz_names(self.family))
            )
        # a feature trains with the empty prompt, whose text tensors some families have in a file
        if EMPTY_PROMPT in features.needs and brings_empty_text(self.family):
            return replace(sources, empty_text=self.family.empty_text())
        return sources

    def _find_items(
        self, sources: BatchSources, *, encodes_texts_on_the_fly: bool, condition_set: str
    ) -> Sequence[TrainingItem]:
        """Find the cached training items by their file names, check their caches, and return them."""
        # 1. List the items, which must exist.
        # 2. Check the channels of new items, and that all caches fit the model and its text encoders.
        # 3. In the first process, warn about media files without caches, and caches without a media file.
        family, process_index = self.family, self.accelerator.process_index
        commands = sources.encoders.commands
        # identity of the checkpoint's own text encoders, by name; caches of other encoders are rejected
        trained_encoder_ids: Mapping[str, Mapping[str, str]] = {}
        trusts_caches = self.options.caching is not None and self.options.caching.skip_cache_check
        if family.abilities.has_text_encoders and not trusts_caches:
            trained_encoder_ids = {encoder.name: encoder.identity for encoder in family.text_encoders()}
        found_items = find_items(
            self.config,
            family.cache_tag,
            family.latent,
            text_keys=family.text_keys,
            stores=sources.stores,
            on_the_fly_tables=sources.tables,
            audio=get_audio_spec(family),
            trusts_index=True,
        )
        items = require_items(found_items, commands)
        # the index of the caches records which items were compared with this model before
        new_items = [item for item in items if item.file_name not in item.cache_info.indexed_checksums]
        if new_items:
            check_channels(new_items, family.latent, commands, sources.stores)
        check_caches(
            family,
            items,
            commands,
            sources.stores,
            encodes_texts_on_the_fly=encodes_texts_on_the_fly,
            process=(process_index, self.accelerator.num_processes),
            condition_set=condition_set,
            trained_encoder_ids=trained_encoder_ids,
        )
        if process_index == 0:
            audio = get_audio_spec(family)
            has_audio_caches = audio is not None and not audio.is_in_latent_cache
            tables = self.config.datasets
            compare_sources(
                tables, found_items, commands, tag=family.cache_tag, trains_audio=has_audio_caches
            )
        return items

    def _split_items(
        self, items: Sequence[TrainingItem], seed: int
    ) -> tuple[Sequence[TrainingItem], Sequence[TrainingItem]]:
        """Return the training items and the validation items; check that the validation options fit them."""
        validating = self.options.validation
        seed = seed if validating.validation_seed is None else validating.validation_seed
        training, validation = split_validation(items, validating.validation_split, seed)
        if not training:
            raise DatasetError(
                f"{self.config.path}: all {len(items)} items are for validation. Leave at least one table "
                "without `validation = true`."
            )
        if validation:
            return training, validation
        schedule = self.options.lr_schedule
        if schedule.lr_scheduler == PLATEAU and not schedule.lr_scheduler_type:
            raise OptionError(
                "--lr_scheduler plateau needs a validation loss: pass --validation_split 0.1, or a table "
                "with validation = true"
            )
        remedy = "pass --validation_split, or `validation = true` in a table"
        if validating.validate_every_n_steps is not None:
            raise OptionError(f"--validate_every_n_steps has nothing to validate on: {remedy}")
        for name in ("validate_every_n_epochs", "max_validation_steps", "validation_seed"):
            if getattr(validating, name) is not None:
                logger.warning("--%s is ignored because there is nothing to validate on: %s", name, remedy)
        return training, validation

    def _warn_of_mismatched_data(
        self,
        features: RunFeatures,
        training: Sequence[TrainingItem],
        validation: Sequence[TrainingItem],
        stores: Stores,
    ) -> None:
        """Warn about captions, rejected items, references and masks that do not fit the options."""
        tables, subset = self.config.datasets, self.options.subset
        caption_checks = [*features.caption_checks]
        custom = self.network_spec.custom
        if custom is not None and custom.reads_captions:
            caption_checks.append(custom.check_captions)
        for read in caption_checks:
            from training.token_captions import check_captions  # only to learn a word

            check_captions(read, training)
        has_rejected_items = any(table.source.worse_directory is not None for table in tables)
        if has_rejected_items and REJECTED_ONES not in features.needs:
            # the rejected items of these tables are left out
            learned = {item.table.index: item.table for item in training}.values()
            names = [table.name for table in learned if table.source.worse_directory is not None]
            if names:
                logger.warning(
                    "%s: worse_directory has no effect in this run: it is for --preference. The better ones "
                    "are learned as usual",
                    ", ".join(names),
                )
        if not self.accelerator.is_main_process:
            return
        takes_references = any(table.references.rules or table.references.clip_rules for table in tables)
        if takes_references and lack_edit_references([*training, *validation], stores):
            logger.warning("%s", NO_REFERENCE)
        has_masks = any(table.source.mask_directory or table.source.alpha_mask for table in tables)
        if subset is not None and subset.masked_loss and not has_masks:
            logger.warning(
                "--masked_loss has no effect: no subset has masks (conditioning_data_dir, or alpha_mask = "
                "true)"
            )


def _compare_with_state(plan: TrainingPlan, saved: SavedState | ForeignState) -> TrainingPlan:
    """Compare a run with its saved state; return the plan with changed settings and adjusted steps."""
    changes = check_resumable(saved, plan.settings, plan.options, plan.saving)
    steps = plan.steps
    if changes and isinstance(saved, SavedState):
        apply_changes(changes, plan.progress, saved)
        # the changes may have started a new plan in the middle of the run
        steps = _plan_steps(plan.options, plan.order, plan.accelerator.num_processes, plan.progress)
    return replace(plan, changes=changes, steps=steps)


@contextmanager
def join_processes(
    family: Family, options: TrainingOptions, config: DatasetConfig
) -> Iterator[tuple[Accelerator, OtherProcesses | None]]:
    """Join the run's processes, and check the options against the device.

    Yields the accelerator, and `OtherProcesses`, which is None for a single process. During the block the
    processes monitor each other, and no other run can use the output folder and name of this one.
    """
    accelerator = make_accelerator(options.accelerator)
    # options that divide work among processes have no effect with one process
    if accelerator.num_processes == 1 and options.speed.modes.single_process_effects:
        warn_if_alone(options.speed)
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.WARNING)  # one process logs for all
    else:
        takes_guidance = family.defaults.embedded_guidance is not None
        lines = list_unused_options(
            options,
            takes_guidance,
            family.noise.table_is_shifted,
            tables=config.datasets,
            family_options=family.options,
            parts=family.learning_parts if options.network is None and trains_checkpoint(family) else None,
        )
        for line in lines:
            logger.warning(line)
    if options.is_fused or options.full_dit is not None:
        check_optimizer(options, accelerator.num_processes)
    compilation = options.speed.compilation.choice
    if compilation is not None:
        from runtime.compile import check_compilation  # only with --compile

        check_compilation(compilation, accelerator.device)
    with ExitStack() as stack:
        if accelerator.num_processes == 1:
            stack.enter_context(reserve_name(*options.saving.folder_and_name))
            yield accelerator, None
            return
        processes = OtherProcesses(accelerator.process_index, accelerator.num_processes)
        stack.enter_context(processes)
        stack.enter_context(processes.explain())
        stack.enter_context(_reserve_name_for_all(options, accelerator))
        yield accelerator, processes


@contextmanager
def _reserve_name_for_all(options: TrainingOptions, accelerator: Accelerator) -> Iterator[None]:
    """Reserve the run's output name during the block, in the main process."""
    # If that fails, all processes exit.
    with ExitStack() as stack:
        error: OutputError | None = None
        if accelerator.is_main_process:
            try:
                stack.enter_context(reserve_name(*options.saving.folder_and_name))
            except OutputError as name_error:
                error = name_error
        (code,) = broadcast_object_list([None if error is None else error.exit_code])
        if error is not None:
            raise error
        if code is not None:
            raise SystemExit(code)
        yield


def check_optimizer(options: TrainingOptions, num_processes: int = 1) -> None:
    """Raise UserError if the optimizer does not support --fused_backward_pass or whole-DiT training."""
    if options.is_fused:
        check_fused_backward(options.optimizer.optimizer_type, num_processes)
    if options.full_dit is not None:
        if options.full_dit.offloads_states:
            check_offload(options.optimizer.optimizer_type)
        if shards_full_model(options):
            check_sharded_optimizer(options.speed.modes.splits_weights, options.optimizer.optimizer_type)


def read_config(options: TrainingOptions, family: Family, network_spec: NetworkSpec) -> DatasetConfig:
    """Read the dataset of a training run from --dataset_config, or from --train_data_dir and its options.

    Args:
        options: Options of the run.
        family: The model family.
        network_spec: Description of the kind of network, or of the whole DiT, that the run trains.

    Raises:
        UserError: If the data cannot be used, or if the noise levels of a table cannot be trained.
    """
    path, subset = options.loop.dataset_config, options.subset
    if options.features.make_data is not None:  # a feature that trains without a dataset, such as LECO
        config = options.features.make_data()
    elif subset is not None and subset.replaces_toml and path is None:
        config = folders_config(subset)
    else:
        if subset is not None and subset.replaces_toml:
            logger.warning("--train_data_dir is ignored because --dataset_config %s describes the data", path)
        path = require(path, "--dataset_config", "the clips to train on")
        config = load_dataset_config(path, subset)
    # the empty prompt is cached like a caption, unless the model comes with its encoded form
    if EMPTY_PROMPT in options.features.needs and not (brings_empty_text(family) and family.empty_text()):
        config = with_empty_prompts(config)
    check_timesteps(options.timesteps, config.datasets, family)
    if network_spec.custom is not None:
        config = check_data(network_spec.custom, config, PRESERVE_OUTPUT)
    return for_family(config, family)


def _check_tables(config: DatasetConfig) -> None:
    """Raise OptionError if a table sets network_multiplier, which full fine-tuning cannot use."""
    scaled = next((table for table in config.datasets if table.learning.network_multiplier != 1), None)
    if scaled is not None:
        raise OptionError(
            f"{scaled.name}: network_multiplier is the strength of a LoRA, and here the model itself is "
            "trained. Omit it"
        )


def _check_batch_sizes(reason: str, config: DatasetConfig) -> None:
    """Raise OptionError if a table's batch size is above 1; `reason` says why the model needs size 1."""
    larger = next((table for table in config.datasets if table.learning.batch_size > 1), None)
    if larger is not None:
        raise OptionError(
            f"{larger.name}: batch_size {larger.learning.batch_size}: {reason}. Set batch_size = 1, and "
            f"--gradient_accumulation_steps {larger.learning.batch_size} for steps of as many clips"
        )


def _plan_steps(
    options: TrainingOptions, order: BatchOrder, num_processes: int, progress: Progress
) -> StepPlan:
    """Plan the steps of the run; --max_train_epochs, if given, replaces --max_train_steps."""
    loop, speed = options.loop, options.speed
    steps = StepPlan(
        num_batches=order.num_batches,
        data_parallel_size=count_groups(speed, num_processes),
        processes_per_batch=speed.modes.processes_per_model,
        accumulation_steps=loop.gradient_accumulation_steps,
        in_lockstep=bool(speed.modes.splits_weights) and num_processes > 1,
        total_steps=loop.max_train_steps,
        first_epoch=progress.plan_epoch,
        first_position=progress.plan_position,
        first_step=progress.plan_step,
    )
    if loop.max_train_epochs is None:
        return steps
    return replace(steps, total_steps=steps.steps_until(loop.max_train_epochs))


def skip_to_initial_step(options: StartOptions, progress: Progress, plan: StepPlan, is_resumed: bool) -> None:
    """Move a new run's progress to the step where it starts.

    Args:
        options: Options of the run.
        progress: Current step and epoch.
        plan: The plan of the run.
        is_resumed: Whether a saved state decides where to continue instead.

    Raises:
        OptionError: If the first step lies beyond the end of the run.
    """
    flag = "--initial_step" if options.initial_epoch is None else "--initial_epoch"
    if is_resumed:
        logger.info("%s is ignored because --resume continues where the state was saved.", flag)
        return
    if options.initial_epoch is not None:
        step = plan.steps_until(options.initial_epoch - 1)
    else:
        step = options.initial_step or 0
    if step >= plan.total_steps:
        raise OptionError(
            f"{flag} {options.initial_epoch or step} is step {step}, but the run ends at step "
            f"{plan.total_steps}: begin earlier, or use a larger --max_train_steps or --max_train_epochs"
        )
    epoch = step // plan.steps_per_epoch
    # position: number of micro-batches of the epoch that are skipped
    progress.step, progress.epoch = step, epoch
    progress.position = (step - plan.steps_until(epoch)) * plan.batches_per_step
    logger.info("Beginning at step %d, epoch %d.", step, epoch + 1)
