"""Build a run from its options, in order; check what can be checked before gigabytes are loaded."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from torch import nn

from dataset.batches.finding import (
    NO_COMMANDS,
    CachingCommands,
    find_items,
    require_items,
    split_validation,
)
from dataset.check import check_training
from dataset.checking.captions import load_counters
from dataset.checking.page import write_check_page
from modules.atomic_write import make_folder
from modules.attention.attend import check_backend
from modules.contract.family import Family
from modules.contract.loading import Placement
from modules.control_codes import escape_control_codes
from modules.devices import DTYPES, choose_device, dtype_name
from modules.dressing import swapped_weights
from modules.errors import OptionError
from modules.offload.block_swap import HostWeights, settle
from modules.planning.memory_plan import too_little
from modules.speed_options import set_blocks_to_swap
from networks.adapter import make_network
from networks.added import AddedFile, add_loras
from networks.loading import read_lora
from networks.merge import LoraPatch, LoraUse
from training.averages import make_average, metadata_of
from training.changes import listed_settings
from training.data.feed import Feed, MicroBatches, Randomness
from training.data.shown_timesteps import show_timesteps
from training.dressing import AUTOCAST, dress, placement_of
from training.early_checks import check_before_loading
from training.following import NO_SCRIPTS, FamilyScripts
from training.job import Data, TrainingJob, find_data, plan_steps, read_config, start_job
from training.loop import TrainingRun, train
from training.metadata import RunFacts, file_metadata, model_card, run_metadata
from training.optimizers.finished_weights import finished_weights
from training.optimizers.fused_backward import FusedBackward
from training.optimizers.lr_schedule import make_lr_schedule, warmup_steps
from training.optimizers.optimizer import make_optimizer, set_training
from training.optimizers.parameter_steps import ParameterSteps, steps_alone
from training.options import TrainingOptions
from training.planning.memory import plan_training, prepare_memory
from training.processes.gradients import largest
from training.reporting import make_reporter, plan_next_steps
from training.reports.logs import TRACKER_NAME, public_config, start_logs
from training.resuming import (
    Learning,
    capture,
    check_resumable,
    habits_of,
    identity_of,
    own_values,
    restore,
    resume_progress,
)
from training.samples import Sampler, prepare_samples
from training.saving.files import MinuteClock, Names, Publish, Saver
from training.saving.states import SavedState, write_state
from training.saving.upload import make_uploads
from training.summary import show_end, show_start, watch_run
from training.trainable import Trainable, train_dit
from training.trainable import train_network as as_trainable
from training.triggers import TriggerFiles, trigger_paths
from training.validation import Validation

logger = logging.getLogger(__name__)


def train_network(
    family: Family,
    options: TrainingOptions,
    commands: CachingCommands = NO_COMMANDS,
    scripts: FamilyScripts = NO_SCRIPTS,
) -> int:
    """Train a network (a LoRA) for a family's DiT, or the whole DiT, from the first step or a saved state.

    commands: what to type if caches are missing. scripts: what the page tells to type next. Returns the
    program's exit code.
    Raises UserError if the user has to change something.
    """
    if options.timesteps.show_timesteps is not None:
        show_timesteps(
            options.timesteps, options.loop.seed or 0, options.saving.output_dir or Path(), family.noise
        )
        return 0
    if options.loop.check:
        return _check(family, options, commands)
    if options.speed.plan.is_asked:
        _plan(family, options, commands)
        return 0
    try:
        with prepare_run(family, options, commands, scripts) as run:
            train(run)
    except torch.OutOfMemoryError as error:
        raise too_little(
            error, "Samples need memory too. What was saved is untouched: continue with --resume latest."
        ) from error
    return 0


@contextlib.contextmanager
def prepare_run(
    family: Family,
    options: TrainingOptions,
    commands: CachingCommands = NO_COMMANDS,
    scripts: FamilyScripts = NO_SCRIPTS,
) -> Iterator[TrainingRun]:
    """Load everything for a run; on exit, end logs and wait for uploads. Raises as `train_network`."""
    config = read_config(options)  # a fault in it is told before anything is started
    job = start_job(family, options, commands)
    _check_attention(job)
    data = find_data(job, config)
    if job.accelerator.is_main_process:
        make_folder(job.output_dir, "--output_dir")
    check_before_loading(family, options, data.plan.total_steps)
    identity = identity_of(
        options, job.progress.seed, data.order, data.plan, job.network_module, family.options
    )
    habits = habits_of(options, family.metadata, family.options)
    changes = check_resumable(job.saved, identity, habits, options)
    resume_progress(job.saved, changes, job.progress, data.plan)
    data = replace(data, plan=plan_steps(job, data.order))
    extra = [AddedFile(read_lora(path), multiplier) for path, multiplier in options.samples.loras()]
    sampler = _make_sampler(job)  # texts and images are encoded while there is no DiT
    following = plan_next_steps(job, scripts, data.plan.total_steps, sampler)  # before auto is resolved
    options, memory = prepare_memory(family, options, data.training, commands, job.accelerator.device)
    # each process looked at its own device, but all share the weights on the host
    if job.options.speed.swap.is_auto:
        number = options.speed.swap.number
        number = largest(number, job.accelerator.num_processes, job.accelerator.device)
        options = replace(options, speed=set_blocks_to_swap(options.speed, number))
    job = replace(job, options=options)
    host = swapped_weights(family.dit, options.speed.swap, job.accelerator.device)
    dit = _load_dit(job, host)
    trainable = _make_trainable(job, dit)
    sample_loras = (
        add_loras(dit, extra, options.speed.compilation.choice is not None) if sampler and extra else None
    )
    learning, optimizer_name = _make_learning(job, dit, trainable, host, data.plan.total_steps)
    if job.saved is not None:
        restore(job.saved, learning, bool(changes))
        job = replace(job, saved=None)  # gives its tensors free
    steps, fused = _make_steps(job, learning)

    uploads = make_uploads(options.hub)
    facts = _facts(job, data, optimizer_name, learning.schedule.name)

    def take_state() -> SavedState:
        settle(dit)
        return capture(job.progress, learning, identity, habits, listed_settings(options))

    reporter = make_reporter(job, following, sampler, memory)

    def publish(path: Path, card: str | None) -> None:
        uploads.publish(path, card)
        if reporter is not None:
            reporter.note_saved(path, job.progress.step)

    saver = _make_saver(job, dit, learning, facts, publish, uploads.publish_state, take_state)
    log_config = public_config(options) if options.logs.log_config else None
    tracker = TRACKER_NAME if options.whole_dit is None else f"{family.name}_ft"
    with (
        uploads.finish_uploads(),
        start_logs(
            job.accelerator,
            options.logs,
            data.plan.total_steps,
            job.progress.step,
            log_config,
            tracker,
            extras=watch_run(job, data.plan),
        ) as logs,
        contextlib.nullcontext() if reporter is None else reporter,
    ):
        if reporter is not None:
            reporter.logs = logs
        show_start(job, data, learning.trainable.parameters, _file_dtype(options, dit))
        run = TrainingRun(
            options=options,
            family=family,
            dit=dit,
            trainable=learning.trainable,
            optimizer=learning.optimizer,
            schedule=learning.schedule,
            plan=data.plan,
            feed=_make_feed(job, data),
            progress=job.progress,
            device=job.accelerator.device,
            autocast=job.accelerator.autocast,
            logs=logs,
            scaler=learning.scaler,
            steps=steps,
            fused=fused,
            saver=saver,
            sampler=sampler,
            average=learning.average,
            sample_loras=sample_loras,
            compute_dtype=AUTOCAST.get(options.accelerator.mixed_precision, _dtype_of(dit)),
            validation=_make_validation(job, data),
            reporter=reporter,
            memory=memory if job.accelerator.is_main_process else None,
            triggers=_watch_files(job, can_sample=sampler is not None),
            clock=MinuteClock(options.saving.save_every_n_minutes if saver is not None else None),
        )
        yield run
        job.accelerator.wait_for_everyone()
    if saver is not None and reporter is not None and job.progress.step >= data.plan.total_steps:
        show_end(run, reporter.history, saver.names, following)


def _watch_files(job: TrainingJob, can_sample: bool) -> TriggerFiles:
    """Watch for files that ask for samples or a save (--sample_now), in the main process."""
    if not (job.options.samples.sample_now and job.accelerator.is_main_process):
        return TriggerFiles()
    return TriggerFiles(trigger_paths(job.output_dir, job.output_name), can_sample)


def _check(family: Family, options: TrainingOptions, commands: CachingCommands) -> int:
    """Print what would be trained on (--check)."""
    config = read_config(options)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    files = [f"{name}: {value}" for name, value in family.metadata.items()]
    accumulation = options.loop.gradient_accumulation_steps
    counters = load_counters(family.text_encoders)
    result = check_training(
        config,
        family.cache_tag,
        family.latent,
        commands,
        accumulation,
        processes,
        files,
        family.text_keys,
        counters,
    )
    sys.stdout.write(escape_control_codes("\n".join(result.lines)) + "\n")
    page, workers = options.loop.page, max(1, os.cpu_count() or 1)
    if page.html is not None:
        write_check_page(
            page.html, config, result, counters, family.latent, family.defaults.fps, page.html_items, workers
        )
    return result.exit_code


def _plan(family: Family, options: TrainingOptions, commands: CachingCommands) -> None:
    """Print how much memory the run would need (--plan)."""
    found = require_items(
        find_items(read_config(options), family.cache_tag, family.latent, family.text_keys), commands
    )
    items, _ = split_validation(found, options.validation.validation_split)
    plan_training(family, options, items or found, commands, choose_device(None))


def _make_sampler(job: TrainingJob) -> Sampler | None:
    """Encode the texts and images of the samples.

    Raises OptionError if an encoder is missing, before the DiT is loaded.
    """
    options, accelerator = job.options.samples, job.accelerator
    if options.sample_prompts is None:
        return None
    if not (options.is_timed or options.sample_now):
        logger.warning(
            "--sample_prompts is ignored because none of --sample_every_n_steps, --sample_every_n_epochs, "
            "--sample_at_first and --sample_now is given."
        )
        return None
    share = accelerator.process_index, accelerator.num_processes
    folder, has_metadata = job.output_dir / "sample", not job.options.metadata.no_metadata
    weights = "".join(f" + {path.name}:{multiplier:g}" for path, multiplier in options.loras())
    if job.options.average.sample_ema:
        weights = " (EMA)" + weights
    return prepare_samples(
        job.family,
        options.sample_prompts,
        folder,
        job.output_name,
        accelerator.device,
        *share,
        has_metadata,
        weights,
    )


def _placement(job: TrainingJob) -> Placement:
    """Return where the DiT goes and its dtype; see `placement_of`."""
    return placement_of(job.options, job.accelerator.device, job.fp8)


def _check_attention(job: TrainingJob) -> None:
    """Raise OptionError if the requested attention is not available; nothing is loaded yet."""
    autocast = AUTOCAST.get(job.options.accelerator.mixed_precision)
    placement = _placement(job)
    check_backend(
        placement.attention,
        placement.device,
        lambda: autocast or job.family.compute_dtype(placement),
        training=True,
    )


def _load_dit(job: TrainingJob, host: HostWeights | None) -> nn.Module:
    """Load the DiT onto the device, frozen, merging --base_weights while loading.

    A DiT that is to be trained gets the training dtype. host: keeps the weights of swapped blocks.
    """
    network, precision = job.options.network, job.options.accelerator.mixed_precision
    files = (
        [] if network is None else zip(network.base_weights or (), network.base_multipliers(), strict=True)
    )
    uses = [LoraUse(read_lora(path), multiplier) for path, multiplier in files]
    patch = LoraPatch(uses) if uses else None
    dit = job.family.load_dit(replace(_placement(job), patch=patch, host=host))
    if patch is not None:
        patch.check()
    dtype, autocast = _dtype_of(dit), AUTOCAST.get(precision)
    if autocast is not None and dtype not in {autocast, torch.float32}:
        raise OptionError(
            f"--mixed_precision {precision}: the model is {dtype_name(dtype)}. Use --mixed_precision no, or "
            "the model's dtype."
        )
    return dit.requires_grad_(False)


def _make_trainable(job: TrainingJob, dit: nn.Module) -> Trainable:
    """Put the network into the DiT, or choose what of the DiT itself learns."""
    options = job.options
    if options.network is None:
        assert options.whole_dit is not None  # one of the two is there
        return train_dit(dit, options.optimizer.learning_rate, options.whole_dit.name_parts)
    network = make_network(options.network, job.family.lora_module, dit, job.progress.seed)
    max_norm = options.network.scale_weight_norms
    return as_trainable(network, options.optimizer.learning_rate, max_norm, job.accelerator.device)


def _make_learning(
    job: TrainingJob, dit: nn.Module, trainable: Trainable, host: HostWeights | None, steps: int
) -> tuple[Learning, str]:
    """Dress the DiT (compiling, checkpointing, swap) and make optimizer and schedule.

    Also returns the optimizer's name for metadata.
    """
    options, device = job.options, job.accelerator.device
    dress(dit, job.family.dit, options.loop, device, options.speed.compilation.choice, host)
    optimizer, name = make_optimizer(options.optimizer, trainable.groups)
    schedule = make_lr_schedule(options.lr_schedule, optimizer, steps)
    set_training(optimizer, True)
    whole = options.whole_dit
    in_float32 = (
        whole is not None and (whole.full_bf16 or whole.fused_backward_pass) and steps_alone(type(optimizer))
    )
    average = make_average(options.average, dit, trainable, optimizer, job.accelerator.is_main_process)
    return Learning(trainable, optimizer, schedule, device, job.accelerator.scaler, in_float32, average), name


def _make_steps(job: TrainingJob, learning: Learning) -> tuple[ParameterSteps | None, FusedBackward | None]:
    """Return what steps single weights and what does so in the backward pass, if the options ask for it."""
    whole, trainable, optimizer = job.options.whole_dit, learning.trainable, learning.optimizer
    if whole is None or not (whole.full_bf16 or whole.fused_backward_pass):
        return None, None
    if not steps_alone(type(optimizer)):
        logger.warning(
            "--full_bf16: this optimizer's steps are rounded to the nearest bf16, which loses small ones."
        )
        return None, None
    steps = ParameterSteps(optimizer, trainable.names, job.progress)
    if not whole.fused_backward_pass:
        return steps, None
    max_norm = job.options.optimizer.max_grad_norm
    if max_norm > 0:
        logger.warning(
            "--fused_backward_pass clips the gradient of each weight by itself to --max_grad_norm "
            f"{max_norm}."
        )
    return steps, FusedBackward(steps, trainable.parameters, max_norm)


def _make_feed(job: TrainingJob, data: Data) -> Feed:
    loop, accelerator = job.options.loop, job.accelerator
    randomness = Randomness(job.options.timesteps, job.progress.seed, job.family.noise)
    return Feed(
        MicroBatches(data.order, job.family.latent, randomness, job.commands),
        data.plan,
        accelerator.process_index,
        loop.max_data_loader_n_workers,
        loop.persistent_data_loader_workers,
        pin_memory=accelerator.device.type == "cuda",
        encoders=data.encoders,
    )


def _make_validation(job: TrainingJob, data: Data) -> Validation | None:
    if not data.validation:
        return None
    accelerator = job.accelerator
    share = accelerator.device, accelerator.process_index, accelerator.num_processes
    return Validation(
        job.family,
        data.validation,
        job.options.timesteps,
        job.commands,
        *share,
        job.options.loss,
        encoders=data.encoders,
    )


def _make_saver(
    job: TrainingJob,
    dit: nn.Module,
    learning: Learning,
    facts: RunFacts,
    publish: Callable[[Path, str | None], None],
    publish_state: Publish,
    take_state: Callable[[], SavedState],
) -> Saver | None:
    """Make the saver in the main process; the others save nothing.

    publish: is given the file and the model card.
    """
    if not job.accelerator.is_main_process:
        return None
    options, progress, trainable = job.options, job.progress, learning.trainable
    run_values = run_metadata(
        options,
        job.family.name,
        job.family.metadata,
        facts,
        own_values(job.family.options, "identity", "habit"),
    )
    dtype = _file_dtype(options, dit)

    def metadata_now() -> dict[str, str]:
        epoch = progress.epoch + (progress.position > 0 or progress.step == 0)
        licence = job.family.release.licence
        return file_metadata(
            run_values, options, job.family.metadata, progress.step, epoch, datetime.now(), licence
        )

    def write_file(path: Path) -> None:
        settle(dit)
        with finished_weights(learning.optimizer, trainable.parameters):
            trainable.write(path, dtype, metadata_now())

    def write_average(path: Path) -> None:
        assert learning.average is not None
        with learning.average.in_place():
            own = {} if options.metadata.no_metadata else metadata_of(learning.average)
            trainable.write(path, dtype, {**metadata_now(), **own})

    card = model_card(options, job.family.release, metadata_now())
    saver = Saver(
        options.saving,
        Names(job.output_dir, job.output_name),
        write_file,
        lambda folder: write_state(folder, take_state()),
        lambda path: publish(path, card),
        publish_state,
        None if learning.average is None else write_average,
    )
    saver.remove_leftovers()
    saver.tidy_steps(progress.step)  # what a run that was killed had no time for
    saver.tidy_epochs(progress.epoch)
    return saver


def _facts(job: TrainingJob, data: Data, optimizer: str, schedule: str) -> RunFacts:
    progress, plan = job.progress, data.plan
    return RunFacts(
        session_id=progress.session_id,
        started_at=progress.started_at,
        seed=progress.seed,
        num_items=data.order.num_items,
        batches_per_epoch=plan.num_batches,
        num_epochs=plan.num_epochs,
        total_steps=plan.total_steps,
        warmup_steps=warmup_steps(job.options.lr_schedule, plan.total_steps),
        optimizer=optimizer,
        lr_scheduler=schedule,
        network_module=job.network_module,
        datasets=[table.describe() for table in data.config.datasets],
        changes=tuple(progress.changes),
    )


def _file_dtype(options: TrainingOptions, dit: nn.Module) -> torch.dtype | None:
    """Return the dtype of saved models; None: every tensor as it is."""
    precision = options.saving.save_precision
    if precision is not None:
        return DTYPES[precision]
    return None if options.network is None else _dtype_of(dit)


def _dtype_of(dit: nn.Module) -> torch.dtype:
    """Return the dtype in which the DiT computes without autocast."""
    own = getattr(dit, "compute_dtype", None)
    return own if isinstance(own, torch.dtype) else next(dit.parameters()).dtype
