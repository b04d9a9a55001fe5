"""Build a run from its options, in order; check what can be checked before gigabytes are loaded."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from dataset.batches.finding import NO_COMMANDS, CachingCommands
from modules.contract.family import Family
from modules.control_codes import shorten
from modules.offload.block_swap import settle_all
from modules.options import option_values
from modules.planning.device_memory import MemoryWatch
from modules.planning.memory_plan import too_little
from modules.speed_options import set_blocks_to_swap
from training.caching_inside import prepare_sources
from training.changes import OptionChange, listed_settings
from training.data.feed import Feed, MicroBatches, Randomness
from training.data.live_text import encoding
from training.dressing import AUTOCAST, dtype_of
from training.early_checks import check_before_loading
from training.experts import note_experts
from training.following import NO_SCRIPTS, FamilyScripts, NextSteps
from training.job import Data, TrainingJob, find_data, plan_steps, read_config, start_job
from training.learning import LoadedModel, check_computing, load_model
from training.live_choice import find_live_texts, text_use
from training.loop import train
from training.loss import LossRule
from training.options import TrainingOptions
from training.planning.memory import prepare_memory
from training.previews import show_preview
from training.processes.gradients import largest
from training.processes.lost import LostProcessError, describe_loss, find_lost, is_of_processes
from training.reporting import make_reporter, plan_next_steps
from training.reports.logs import TRACKER_NAME, Logs, public_config, start_logs
from training.reports.reporter import NoReports, RunReporter
from training.resuming import capture, check_resumable, habits_of, identity_of, resume_progress
from training.samples import Sampler, prepare_samples
from training.saver import facts_of_run, file_dtype, make_saver
from training.saving.earlier import is_of_another_run, paths_in, set_aside
from training.saving.files import MinuteClock, Saver
from training.saving.states import SavedState
from training.saving.upload import make_uploads
from training.starting import begin_later
from training.summary import show_end, show_start, watch_run
from training.training_run import TrainingRun
from training.triggers import TriggerFiles, trigger_paths
from training.validation import Validation, ValidationRule, image_rule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """Hold what a state says of its run's settings, and what --resume_changed changes."""

    identity: dict[str, Any]
    habits: dict[str, Any]
    changes: Sequence[OptionChange]


def train_network(
    family: Family,
    options: TrainingOptions,
    commands: CachingCommands = NO_COMMANDS,
    scripts: FamilyScripts = NO_SCRIPTS,
    sampling: Family | None = None,
) -> int:
    """Train a network (a LoRA) for a family's DiT, or the whole DiT, from the first step or a saved state.

    commands: what to type if caches are missing. scripts: what the page tells to type next. sampling: the
    model of samples, if it has transformers that are not trained. Returns the program's exit code.
    Raises UserError if the user has to change something.
    """
    code = show_preview(family, options, commands, sampling)
    if code is not None:
        return code
    try:
        with prepare_run(family, options, commands, scripts, sampling) as run:
            train(run)
    except LostProcessError as error:
        if error.is_told_here:
            raise
        raise SystemExit(error.exit_code) from None  # another process tells it
    except torch.OutOfMemoryError as error:
        raise too_little(
            error,
            "Samples need memory too. What was saved is untouched: if there is a state, continue with "
            "--resume latest-or-fail.",
        ) from error
    return 0


@contextlib.contextmanager
def prepare_run(
    family: Family,
    options: TrainingOptions,
    commands: CachingCommands = NO_COMMANDS,
    scripts: FamilyScripts = NO_SCRIPTS,
    sampling: Family | None = None,
) -> Iterator[TrainingRun]:
    """Load everything for a run; on exit, end logs and wait for uploads. Raises as `train_network`."""
    with contextlib.ExitStack() as held:
        yield from _prepare(held, family, options, commands, scripts, sampling)


def _prepare(
    held: contextlib.ExitStack,
    family: Family,
    options: TrainingOptions,
    commands: CachingCommands,
    scripts: FamilyScripts,
    sampling: Family | None,
) -> Iterator[TrainingRun]:
    """Yield the run of `prepare_run`. held: ends with it."""
    job, data, comparison = _begin(family, options, commands, held, sampling)
    plan, progress = data.plan, job.progress
    sampler = _make_sampler(job)  # texts and images are encoded while there is no DiT
    following = plan_next_steps(job, scripts, plan.total_steps, sampler)  # before auto is resolved
    job, memory = _resolve_memory(job, data)
    texts = data.texts
    if texts is not None:
        texts.load(job.accelerator.device)
    has_samples = sampler is not None
    loaded = load_model(job, plan.total_steps, comparison.changes, has_samples, texts)
    if sampler is not None and texts is not None and texts.learning:
        sampler = replace(sampler, renew=texts.renew)
    _set_earlier_aside(job)  # when nothing can be missing any more
    job = replace(job, saved=None)  # gives its tensors free
    uploads, learning = make_uploads(job.options.hub), loaded.learning
    facts = facts_of_run(job, data, loaded.optimizer_name, learning.schedule.name)

    def take_state() -> SavedState:
        settle_all(loaded.dits.networks)
        settings = listed_settings(job.options)
        return capture(progress, learning, comparison.identity, comparison.habits, settings)

    with (
        encoding(texts),
        uploads.finish_uploads(),
        _start_logs(job, data) as logs,
        make_reporter(job, following, sampler, memory, logs) as reporter,
    ):

        def publish(path: Path, card: str | None) -> None:
            uploads.publish(path, card)
            reporter.note_saved(path, progress.step)

        networks, prompts = loaded.dits.networks, () if sampler is None else sampler.prompts
        outlets = publish, uploads.publish_state
        saver = make_saver(job, networks, learning, facts, *outlets, take_state, prompts)
        show_start(job, data, learning.trainable.parameters, file_dtype(job.options, networks[0]))
        run = _make_run(job, data, loaded, logs, saver, sampler, reporter, memory)
        with _watch_others(job, following):
            yield run
        job.accelerator.wait_for_everyone()
    if saver is not None and isinstance(reporter, RunReporter) and progress.step >= plan.total_steps:
        show_end(run, reporter.history.events_told, saver.names, following)


@contextlib.contextmanager
def _watch_others(job: TrainingJob, following: NextSteps) -> Iterator[None]:
    """Raise LostProcessError in place of what torch says when another process of the run was lost."""
    rank, count = job.accelerator.process_index, job.accelerator.num_processes
    try:
        yield
    except Exception as error:
        if count == 1 or not is_of_processes(error):
            raise
        lost = find_lost(rank, count)
        first = min({*range(count)} - {*(lost or ())}, default=rank)
        said = shorten((str(error) or type(error).__name__).splitlines()[0], 160)
        text = f"{describe_loss(lost)} torch says: {said}\n  {following.after_loss()}"
        raise LostProcessError(text, lost is None or rank == first) from None


def _set_earlier_aside(job: TrainingJob) -> None:
    """Set aside what another run of this name left, unless --overwrite replaces it."""
    if job.accelerator.is_main_process and not job.options.saving.overwrite:
        is_new = not isinstance(job.saved, SavedState)
        if is_new or is_of_another_run(job.names, job.progress.session_id):
            inputs = paths_in(option_values(job.options) | option_values(job.family.options))
            inputs += [job.saved.folder] if job.saved else []
            set_aside(job.names, inputs, datetime.now(), job.options.saving.resume is not None)
    job.accelerator.wait_for_everyone()  # before any writes samples there


def _begin(
    family: Family,
    options: TrainingOptions,
    commands: CachingCommands,
    held: contextlib.ExitStack,
    sampling: Family | None,
) -> tuple[TrainingJob, Data, Comparison]:
    """Find state, items and steps, and check all that can be known before anything large is loaded."""
    config = read_config(options)  # a fault in it is told before anything is started
    job = start_job(family, options, commands, held, sampling)
    check_computing(job)
    if options.caching is not None:  # before minutes of encoding
        check_before_loading(family, options, options.loop.max_train_steps, sampling)
    texts = find_live_texts(family, options, config)
    use = text_use(family, texts)
    sources = prepare_sources(family, config, options.caching, job.accelerator.device, use)
    data = find_data(job, config, sources, texts)
    check_before_loading(family, options, data.plan.total_steps, sampling)
    options = replace(options, saving=options.saving.spread(data.plan.num_epochs))
    job = replace(job, options=options)
    if job.accelerator.is_main_process:
        note_experts(family, options, sampling is not None)
    identity = identity_of(
        options, job.progress.seed, data.order, data.plan, job.network_module, family.options, family.experts
    )
    habits = habits_of(options, family.metadata, family.options)
    changes = check_resumable(job.saved, identity, habits, options)
    resume_progress(job.saved, changes, job.progress, data.plan)
    if options.start is not None:
        begin_later(options.start, job.progress, data.plan, job.saved is not None)
    return job, replace(data, plan=plan_steps(job, data.order)), Comparison(identity, habits, changes)


def _resolve_memory(job: TrainingJob, data: Data) -> tuple[TrainingJob, MemoryWatch | None]:
    """Resolve --blocks_to_swap auto, to the same number in all processes; also return what watches memory."""
    device, processes = job.accelerator.device, job.accelerator.num_processes
    options, memory = prepare_memory(
        job.family, job.options, data.training, job.commands, device, data.sources, data.texts
    )
    # each process looked at its own device, but all share the weights on the host
    if job.options.speed.swap.is_auto:
        number = largest(options.speed.swap.number, processes, device)
        options = replace(options, speed=set_blocks_to_swap(options.speed, number))
    return replace(job, options=options), memory


def _start_logs(job: TrainingJob, data: Data) -> Logs:
    options = job.options
    return start_logs(
        job.accelerator,
        options.logs,
        data.plan.total_steps,
        job.progress.step,
        public_config(options) if options.logs.log_config else None,
        TRACKER_NAME if options.whole_dit is None else f"{job.family.name}_ft",
        extras=watch_run(job, data.plan),
    )


def _make_run(
    job: TrainingJob,
    data: Data,
    loaded: LoadedModel,
    logs: Logs,
    saver: Saver | None,
    sampler: Sampler | None,
    reporter: RunReporter | NoReports,
    memory: MemoryWatch | None,
) -> TrainingRun:
    options, learning = job.options, loaded.learning
    rule = LossRule(options.loss, options.predicted, learning.trainable.as_base)
    return TrainingRun(
        options=options,
        family=job.family,
        dits=loaded.dits,
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
        steps=loaded.steps,
        fused=loaded.fused,
        saver=saver,
        sampler=sampler,
        average=learning.average,
        sample_loras=loaded.sample_loras,
        sample_dits=loaded.sample_dits,
        compute_dtype=AUTOCAST.get(options.accelerator.mixed_precision, dtype_of(loaded.dits.networks[0])),
        rule=rule,
        texts=data.texts,
        validation=_make_validation(job, data, rule),
        reporter=reporter,
        memory=memory if job.accelerator.is_main_process else None,
        triggers=_watch_files(job, can_sample=sampler is not None),
        clock=MinuteClock(options.saving.save_every_n_minutes if saver is not None else None),
    )


def _watch_files(job: TrainingJob, can_sample: bool) -> TriggerFiles:
    """Watch for files that ask for samples or a save (--sample_now), in the main process."""
    if not (job.options.samples.sample_now and job.accelerator.is_main_process):
        return TriggerFiles()
    return TriggerFiles(trigger_paths(job.output_dir, job.output_name), can_sample)


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
        job.sampled,
        options.sample_prompts,
        folder,
        job.output_name,
        accelerator.device,
        *share,
        has_metadata,
        weights,
        options.preview,
    )


def _make_feed(job: TrainingJob, data: Data) -> Feed:
    loop, accelerator = job.options.loop, job.accelerator
    randomness = Randomness(
        job.options.timesteps,
        job.progress.seed,
        job.family.noise,
        tuple(job.family.experts),
        job.options.noise,
        job.options.weighted_by,
    )
    return Feed(
        MicroBatches(data.order, job.family.latent, randomness, job.commands, data.plan, data.sources),
        data.plan,
        accelerator.process_index,
        loop.max_data_loader_n_workers,
        loop.persistent_data_loader_workers,
        pin_memory=accelerator.device.type == "cuda",
        encoders=data.encoders,
    )


def _make_validation(job: TrainingJob, data: Data, loss: LossRule) -> Validation | None:
    if not data.validation:
        return None
    accelerator, options = job.accelerator, job.options
    asked = options.validation
    return Validation(
        job.family,
        data.validation,
        options.timesteps,
        job.commands,
        accelerator.device,
        accelerator.process_index,
        accelerator.num_processes,
        loss,
        image_rule(asked, options.timesteps)
        if options.is_for_images
        else ValidationRule(most=asked.max_validation_steps, seed=asked.validation_seed),
        sources=data.sources,
        encoders=data.encoders,
        texts=data.texts,
    )
