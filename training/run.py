"""Train: build a run from its options, in order, and give it to the loop."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dataset.batches.items import NO_COMMANDS, CachingCommands
from modules.contract.family import Family
from modules.dressing import shared_blocks
from modules.installation import RUN_CHECKS, RUN_GOES_ON, import_own
from modules.options import option_values
from modules.planning.device_memory import too_little
from modules.speed_options import SwapOptions
from training.checks import check_before_loading
from training.following import NextSteps, plan_next_steps
from training.learning import load_model, make_run
from training.loop import train
from training.options import TrainingOptions
from training.plan import TrainingPlan, join_processes, make_plan, read_config
from training.reports.history import Story, read_session
from training.reports.logs import TRACKER_NAME, Logs, public_config
from training.reports.pauses import StepClock
from training.saver import file_dtype, make_saver
from training.saving.files import set_aside
from training.saving.states import SavedState
from training.summary import count_pauses, make_reporter, show_end, show_start, watch_run
from training.training_run import TrainingRun

if TYPE_CHECKING:  # it is loaded only if there are prompts
    from training.samples import Sampler

logger = logging.getLogger(__name__)


def train_network(
    family: Family,
    options: TrainingOptions,
    commands: CachingCommands = NO_COMMANDS,
    follow: Callable[..., NextSteps] = plan_next_steps,
    sampling: Family | None = None,
) -> int:
    """Train a network (a LoRA) for a family's DiT, or the whole DiT, from the first step or a saved state.

    commands: to show if caches are missing. follow: given the plan and the sampler, makes the commands that
    the page shows as next steps. sampling: the model of samples, if it has transformers that are not
    trained. Returns the program's exit code. Raises UserError if the user has to change something.
    """
    if os.environ.get(RUN_GOES_ON) == RUN_CHECKS:
        read_config(options, family)
        check_before_loading(family, options, options.loop.known_steps, sampling)
        return 0
    if options.only_shows:
        code: int = import_own("training.previews").show_preview(family, options, commands, sampling)
        return code
    try:
        with prepare_run(family, options, commands, follow, sampling) as run:
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
    follow: Callable[..., NextSteps] = plan_next_steps,
    sampling: Family | None = None,
) -> Iterator[TrainingRun]:
    """Load everything for a run; on exit, end logs and wait for uploads. Raises as `train_network`."""
    config = read_config(options, family)  # faults in it are reported before anything is started
    with contextlib.ExitStack() as held:
        accelerator, others = held.enter_context(join_processes(family, options))
        plan = make_plan(family, options, commands, config, accelerator, sampling)
        texts, progress, prompts = plan.texts, plan.progress, options.samples.sample_prompts
        # texts and images are encoded while there is no DiT
        sampler = _make_sampler(plan, prompts) if prompts is not None else None
        following = follow(plan, sampler)
        if others is not None:
            others.advice = following.after_loss
        swap, memory = options.speed.swap, None
        if accelerator.device.type == "cuda" or swap.is_auto:  # others need no planner
            swap, memory = import_own("training.planning.memory").prepare_memory(plan)
        if texts is not None:
            texts.load(accelerator.device, shared_blocks(options.speed.sharding, accelerator.device))
            held.callback(texts.free)
        logs = _make_logs(plan, swap)
        reporter = make_reporter(plan, following, sampler, memory)
        model = load_model(plan, swap, sampler is not None)
        # nothing can be missing any more
        _set_earlier_aside(plan, reporter.history.path)
        accelerator.wait_for_everyone()  # before any writes samples there
        has_hub = options.hub.huggingface_repo_id is not None
        uploads = import_own("training.saving.hub").make_uploads(options.hub) if has_hub else None
        saver = make_saver(model, uploads, sampler.prompts if sampler else (), reporter.note_saved)
        run = make_run(model, sampler, memory, logs, reporter, saver)
        closing = contextlib.closing(uploads) if uploads is not None else contextlib.nullcontext()
        with closing, logs, reporter:
            show_start(run, file_dtype(options, model.dits.networks[0]))
            with contextlib.nullcontext() if others is None else others.explain():
                yield run
            accelerator.wait_for_everyone()
        if accelerator.is_main_process and progress.step >= plan.steps.total_steps:
            show_end(run, Story.of(reporter.history.events), following)


def _make_logs(plan: TrainingPlan, swap: SwapOptions) -> Logs:
    options, progress = plan.options, plan.progress
    return Logs(
        plan.accelerator,
        options.logs,
        plan.steps.total_steps,
        progress.step,
        public_config(options, plan.saving, swap) if options.logs.log_config else {},
        TRACKER_NAME if options.whole_dit is None else f"{plan.family.name}_ft",
        extras=partial(watch_run, plan),
        clock=StepClock(
            lambda step: count_pauses(
                options, plan.saving, plan.steps, bool(plan.validation), step, progress.epoch
            )
        ),
    )


def _set_earlier_aside(plan: TrainingPlan, history: Path) -> None:
    """Set aside the files of an earlier run of this name, unless this one goes on or replaces them."""
    saving = plan.saving
    if saving.overwrite or not plan.accelerator.is_main_process:
        return
    is_new = not isinstance(plan.saved, SavedState)
    if is_new or read_session(history) not in (None, plan.progress.session_id):
        given = option_values(plan.options) | option_values(plan.family.options)
        lists = (value if isinstance(value, (list, tuple)) else (value,) for value in given.values())
        inputs = [value for each in lists for value in each if isinstance(value, Path)]
        inputs += [plan.saved.folder] if plan.saved else []
        set_aside(plan.names, inputs, datetime.now(), saving.resume is not None)


def _make_sampler(plan: TrainingPlan, prompts: Path) -> "Sampler":
    """Encode the texts and images of the samples.

    Raises OptionError if an encoder is missing, before the DiT is loaded.
    """
    options, accelerator = plan.options.samples, plan.accelerator
    share = accelerator.process_index, accelerator.num_processes
    folder, has_metadata = plan.names.folder / "sample", not plan.options.metadata.no_metadata
    weights = "".join(f" + {path.name}:{multiplier:g}" for path, multiplier in options.loras())
    if plan.options.average.sample_ema:
        weights = " (EMA)" + weights
    sampler: Sampler = import_own("training.samples").prepare_samples(
        plan.sampled,
        prompts,
        folder,
        plan.names.name,
        accelerator.device,
        *share,
        has_metadata,
        weights,
        options.preview,
        plan.steps.works_together,
        shared_blocks(plan.options.speed.sharding, accelerator.device),
    )
    return replace(sampler, renew=plan.texts.renew) if plan.texts and plan.texts.learning else sampler
