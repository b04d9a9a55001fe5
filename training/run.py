"""Train: build a run from its options, step by step, and pass it to the training loop."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from modules.devices import freeze_libraries
from modules.installation import RUN_CHECKS, RUN_GOES_ON
from modules.lost_processes import LostProcessError
from modules.options import option_values
from modules.private_torch import dynamo
from protocols.family import Family
from runtime.options import SwapOptions
from runtime.planning.device_memory import MemoryWatch, too_little
from runtime.ways.composing import make_block_sharder
from training.checks import check_before_loading
from training.features.composing import act_at_end, call_end_hooks
from training.features.hooks import RunEnd
from training.learner import find_network_spec
from training.learning import load_model, make_run
from training.loop import train
from training.next_commands import NO_COMMAND, NextSteps, TrainingCommand, plan_next_steps
from training.optimizers.optimizer import find_optimizer
from training.options import TrainingOptions
from training.other_models import NO_OTHERS, OtherFamilies
from training.plan import RunPlanner, TrainingPlan, check_optimizer, join_processes, read_config
from training.reports.history import read_session
from training.reports.logs import Logs
from training.reports.pauses import StepClock
from training.saver import file_dtype, make_saver
from training.saving.files import Publisher, move_earlier_results
from training.saving.states import SavedState
from training.summary import count_pauses, make_reporter, show_end, show_start, watch_run
from training.training_run import TrainingRun

if TYPE_CHECKING:  # loaded only if there are prompts
    from training.samples import Sampler

logger = logging.getLogger(__name__)


def train_network(
    family: Family,
    options: TrainingOptions,
    command: TrainingCommand = NO_COMMAND,
    others: OtherFamilies = NO_OTHERS,
) -> int:
    """Train a network (a LoRA) for a family's DiT, or the whole DiT, from the first step or a saved state.

    Args:
        family: The model family.
        options: Options of the run.
        command: Command that was typed; suggested commands, for missing caches and next steps, repeat its
            options.
        others: Models in addition to the trained one.

    Returns:
        The program's exit code.

    Raises:
        UserError: If the options, the data or a file cannot be used.
    """
    for change in options.features.on.family:  # features may replace parts of the family
        family = change(family)
    network_spec = find_network_spec(family, options.network, options.features.lora_replacement)
    find_optimizer(options.optimizer.optimizer_type)  # a mistyped name is reported before the data are read
    if os.environ.get(RUN_GOES_ON) == RUN_CHECKS:  # `reelsmith run` checks the training before it caches
        read_config(options, family, network_spec)
        check_optimizer(options)
        check_before_loading(family, options, network_spec, others)
        return 0
    if options.exits_before_training:
        from training.previews import show_preview  # trains nothing

        commands = command.caching_commands(options, family)
        return show_preview(family, options, network_spec, commands, others)
    dynamo()  # the first optimizer step would import it; import it earlier, so that it is frozen too
    freeze_libraries()
    with call_end_hooks(options.features) as end:
        try:
            with prepare_run(family, options, command, others=others, end=end) as run:
                end.has_begun = True
                end.is_finished = train(run)
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
    command: TrainingCommand = NO_COMMAND,
    others: OtherFamilies = NO_OTHERS,
    end: RunEnd | None = None,
) -> Iterator[TrainingRun]:
    """Yield a run with everything loaded; on exit, close its logs and wait for uploads.

    1. Read the dataset's file, join the processes, and plan the run.
    2. Encode the prompts and images of samples; the encoders are then freed.
    3. Load the text encoders that run during training, then the trained transformers. In this order, models
       that are not needed together are not in memory together.
    4. Move the results of an earlier run away, and yield the run.

    Args:
        family: The model family.
        options: Options of the run.
        command: Command that was typed.
        others: Models in addition to the trained one.
        end: Records the progress of the run for features that act at its end.

    Raises:
        UserError: If the options, the data or a file cannot be used.
    """
    end = end or RunEnd(options.features)
    network_spec = find_network_spec(family, options.network, options.features.lora_replacement)
    # its errors are reported before processes are started
    config = read_config(options, family, network_spec)
    with contextlib.ExitStack() as stack:
        # `other_processes` watches them; None if this is the only process
        accelerator, other_processes = stack.enter_context(join_processes(family, options, config))
        end.is_due = accelerator.is_main_process
        if other_processes is not None:
            other_processes.at_end = lambda reason: act_at_end(end, LostProcessError(reason))
        plan = RunPlanner(
            family=family,
            options=options,
            commands=command.caching_commands(options, family),
            network_spec=network_spec,
            config=config,
            accelerator=accelerator,
            others=others,
        ).plan()
        end.progress, end.total_steps = plan.progress, plan.steps.total_steps
        for prepare in plan.features.on.plan:
            prepare(plan)
        # prompts and images of samples are encoded before the DiT takes the memory
        sampler = None
        if options.samples.sample_prompts is not None:
            sampler = _make_sampler(plan, options.samples.sample_prompts)
        next_steps = plan_next_steps(plan, sampler, command)
        if other_processes is not None:
            other_processes.advice = next_steps.after_loss
        run, publisher = _load_run(plan, sampler, next_steps, stack)
        closing = contextlib.closing(publisher) if publisher is not None else contextlib.nullcontext()
        with closing, run.logs, run.reporter:
            show_start(run, file_dtype(options, run.model.dits.networks[0]))
            with contextlib.nullcontext() if other_processes is None else other_processes.explain():
                yield run
            accelerator.wait_for_everyone()
        if accelerator.is_main_process and run.reporter.is_finished:
            show_end(run, run.reporter.history.run_history, next_steps)


def _load_run(
    plan: TrainingPlan, sampler: "Sampler | None", next_steps: NextSteps, stack: contextlib.ExitStack
) -> tuple[TrainingRun, Publisher | None]:
    """Load the text encoders that run during training, then the trained transformers; return the run."""
    # The results of an earlier run are moved away only after everything is loaded, so that a failed start
    # does not move them.
    speed, device = plan.options.speed, plan.accelerator.device
    swap = speed.swap
    memory: MemoryWatch | None = None
    if device.type == "cuda" or swap.is_auto:
        from training.planning.memory import prepare_memory  # other runs need no planner

        swap, memory = prepare_memory(plan)
    if plan.live_encoders is not None:
        plan.live_encoders.load(device, make_block_sharder(speed, device))
        stack.callback(plan.live_encoders.free)
    logs = _make_logs(plan, swap)
    reporter = make_reporter(plan, next_steps, memory)
    model = load_model(plan, swap)
    _move_earlier_run_away(plan, reporter.history.path)
    plan.accelerator.wait_for_everyone()  # before any process writes samples
    publisher = None if plan.features.storage is None else plan.features.storage.make_publisher()
    saver = make_saver(
        model,
        publisher,
        () if sampler is None else [*dict.fromkeys(sampler.prompts)],
        log_saved=reporter.log_saved,
        on_removed=reporter.log_files,
    )
    run = make_run(model, sampler, memory=memory, logs=logs, reporter=reporter, saver=saver)
    return run, publisher


def _make_logs(plan: TrainingPlan, swap: SwapOptions) -> Logs:
    """Return the logs of the run, with a clock that includes future pauses in the remaining time."""
    options, progress = plan.options, plan.progress

    def pauses_after(step: int) -> dict[str, int]:
        return count_pauses(
            options,
            plan.saving,
            plan.steps,
            validates=bool(plan.validation),
            step=step,
            epoch=progress.epoch,
        )

    return Logs(
        plan.accelerator,
        plan.steps.total_steps,
        first_step=progress.step,
        recorders=[make(plan, (options, plan.saving, swap)) for make in plan.features.on.recorders],
        extras=partial(watch_run, plan),
        clock=StepClock(pauses_after),
    )


def _move_earlier_run_away(plan: TrainingPlan, history: Path) -> None:
    """Move files of an earlier run with this name aside, unless this run continues or overwrites it."""
    saving, saved = plan.saving, plan.saved
    if saving.overwrite or not plan.accelerator.is_main_process:
        return
    is_new = not isinstance(saved, SavedState)
    if is_new or read_session(history) not in (None, plan.progress.session_id):
        inputs: list[Path] = []
        for value in (option_values(plan.options) | option_values(plan.family.options)).values():
            values = value if isinstance(value, (list, tuple)) else (value,)
            inputs += [path for path in values if isinstance(path, Path)]
        if saved:
            inputs.append(saved.folder)
        move_earlier_results(plan.names, inputs, datetime.now(), saving.resume is not None)


def _make_sampler(plan: TrainingPlan, prompts: Path) -> "Sampler":
    """Return the sampler of the run, after encoding its prompts and images."""
    options, accelerator = plan.options, plan.accelerator
    from training.samples import PromptSource, prepare_samples  # only with prompts

    weights_suffix = "".join(f" + {path.name}:{multiplier:g}" for path, multiplier in options.samples.loras())
    average = plan.features.average
    if average is not None and average.is_sampled:
        weights_suffix = f" ({average.name}){weights_suffix}"
    source = PromptSource(
        prompts,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        is_joint=plan.steps.works_together,
        expansions=plan.features.sample_entries,
        trains_lora=plan.network_spec.lora_options is not None,
    )
    sampler = prepare_samples(
        plan.sample_family,
        source,
        folder=plan.names.folder / "sample",
        name=plan.names.name,
        device=accelerator.device,
        has_metadata=not options.metadata.no_metadata,
        weights_suffix=weights_suffix,
        preview=options.samples.preview,
        block_sharder=make_block_sharder(options.speed, accelerator.device),
    )
    # outputs of trained text encoders change, so prompts are encoded again for each sample
    if plan.live_encoders and plan.live_encoders.trained_encoders:
        return replace(sampler, encode_again=plan.live_encoders.encode_again)
    return sampler
