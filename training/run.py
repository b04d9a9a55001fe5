"""Train: build a run from its options, in order, and give it to the loop."""

import contextlib
import logging
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch

from dataset.batches.items import NO_COMMANDS, CachingCommands
from modules.contract.family import Family
from modules.contract.loading import BlockPlace
from modules.dressing import shared_blocks
from modules.installation import import_own
from modules.options import option_values
from modules.planning.memory_plan import too_little
from training.following import NO_SCRIPTS, FamilyScripts, make_reporter, plan_next_steps
from training.learning import load_model
from training.loop import train
from training.options import TrainingOptions
from training.plan import TrainingPlan, make_plan
from training.planning.memory import prepare_memory
from training.reports.logs import TRACKER_NAME, Logs, public_config
from training.saver import file_dtype, make_saver
from training.saving.files import is_of_another_run, paths_in, set_aside
from training.saving.hub import make_uploads
from training.saving.states import SavedState
from training.summary import show_end, show_start, watch_run
from training.training_run import MakesSamples, NoMemoryWatch, NoSampler, TrainingRun

logger = logging.getLogger(__name__)


def train_network(
    family: Family,
    options: TrainingOptions,
    commands: CachingCommands = NO_COMMANDS,
    scripts: FamilyScripts = NO_SCRIPTS,
    sampling: Family | None = None,
) -> int:
    """Train a network (a LoRA) for a family's DiT, or the whole DiT, from the first step or a saved state.

    commands: to show if caches are missing. scripts: to show on the page as next ones. sampling: the model of
    samples, if it has transformers that are not trained. Returns the program's exit code.
    Raises UserError if the user has to change something.
    """
    if options.only_shows:
        code: int = import_own("training.previews").show_preview(family, options, commands, sampling)
        return code
    try:
        with prepare_run(family, options, commands, scripts, sampling) as run:
            train(run)
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
        plan = make_plan(family, options, commands, held, sampling)
        accelerator, texts, progress = plan.accelerator, plan.texts, plan.progress
        sampler = _make_sampler(plan)  # texts and images are encoded while there is no DiT
        following = plan_next_steps(plan, scripts, sampler)
        if plan.others is not None:
            plan.others.advice = following.after_loss
        swap, watch = prepare_memory(plan)
        memory = watch or NoMemoryWatch()
        texts.load(accelerator.device, _shared_blocks(plan))
        held.callback(texts.free)
        logs = Logs(
            accelerator,
            options.logs,
            plan.steps.total_steps,
            progress.step,
            public_config(plan.options, swap) if options.logs.log_config else {},
            TRACKER_NAME if options.whole_dit is None else f"{family.name}_ft",
            extras=watch_run(plan),
        )
        reporter = make_reporter(plan, following, sampler, memory)
        run = load_model(plan, swap, sampler, memory, logs, reporter)
        _set_earlier_aside(plan)  # when nothing can be missing any more
        uploads = make_uploads(options.hub)

        def publish(path: Path, card: str | None) -> None:
            uploads.publish(path, card)
            reporter.note_saved(path, progress.step)

        run.saver = make_saver(run, publish, uploads.publish_state)
        with contextlib.closing(uploads), logs, reporter:
            show_start(run, file_dtype(options, run.dits.networks[0]))
            with contextlib.nullcontext() if plan.others is None else plan.others.explain():
                yield run
            accelerator.wait_for_everyone()
        if accelerator.is_main_process and progress.step >= plan.steps.total_steps:
            show_end(run, reporter.history.events_told, following)


def _set_earlier_aside(plan: TrainingPlan) -> None:
    """Set aside the files of an earlier run of this name, unless --overwrite replaces them."""
    if plan.accelerator.is_main_process and not plan.options.saving.overwrite:
        is_new = not isinstance(plan.saved, SavedState)
        if is_new or is_of_another_run(plan.names, plan.progress.session_id):
            inputs = paths_in(option_values(plan.options) | option_values(plan.family.options))
            inputs += [plan.saved.folder] if plan.saved else []
            set_aside(plan.names, inputs, datetime.now(), plan.options.saving.resume is not None)
    plan.accelerator.wait_for_everyone()  # before any writes samples there


def _shared_blocks(plan: TrainingPlan) -> BlockPlace | None:
    """Return what splits text encoders over processes; None if each has them whole."""
    return shared_blocks(plan.options.speed.sharding, plan.accelerator.device)


def _make_sampler(plan: TrainingPlan) -> MakesSamples:
    """Encode the texts and images of the samples.

    Raises OptionError if an encoder is missing, before the DiT is loaded.
    """
    options, accelerator = plan.options.samples, plan.accelerator
    if options.sample_prompts is None:
        return NoSampler()
    if not (options.is_timed or options.sample_now):
        logger.warning(
            "--sample_prompts is ignored because none of --sample_every_n_steps, --sample_every_n_epochs, "
            "--sample_at_first and --sample_now is given."
        )
        return NoSampler()
    share = accelerator.process_index, accelerator.num_processes
    folder, has_metadata = plan.names.folder / "sample", not plan.options.metadata.no_metadata
    weights = "".join(f" + {path.name}:{multiplier:g}" for path, multiplier in options.loras())
    if plan.options.average.sample_ema:
        weights = " (EMA)" + weights
    sampler: MakesSamples = import_own("training.samples").prepare_samples(
        plan.sampled,
        options.sample_prompts,
        folder,
        plan.names.name,
        accelerator.device,
        *share,
        has_metadata,
        weights,
        options.preview,
        plan.steps.works_together,
        _shared_blocks(plan),
    )
    return sampler
