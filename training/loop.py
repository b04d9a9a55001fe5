"""The training loop: micro-batches -> loss -> gradients -> optimizer step; then log, validate, sample, save.

The DiT has no wrapper. Each process works on its share of a step's micro-batches (steps.py), gradients are
summed over the processes once per step, and the loss of a micro-batch is divided by the number of
micro-batches the step really has. A run's numbers depend on its settings and its seed alone: not on samples,
validation, saving, or on where it was stopped and resumed.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from modules.devices import tensor_on
from modules.errors import UserError
from networks.adapter import NormReport
from training.bad_steps import explain_bad_step
from training.data.live import LiveTextEncoders
from training.features import phases
from training.features.composing import bad_step_remedies
from training.features.hooks import RunFeatures
from training.loss import NoisyBatch
from training.optimizers.optimizer import evaluation
from training.optimizers.stepping import FusedBackward, StepAfterBackward
from training.processes import (
    compute_gradient_norm,
    fill_missing_gradients,
    reduce_max,
    sum_over_processes,
)
from training.reports.history import LOSS
from training.reports.logs import (
    GRADIENT_NORM_COLUMN,
    LOSS_COLUMN,
    REQUEST_COLUMNS,
    WEIGHT_NORM_COLUMNS,
    StepReport,
    name_rates,
)
from training.reports.pauses import SAMPLES, SAVING, VALIDATION
from training.rewinding import rewind
from training.targets.passes import StreamErrors, loss_passes
from training.trainable import seed_networks
from training.training_run import (
    SAMPLE,
    SAVE,
    STOP,
    GradientStep,
    LoopPhases,
    Reread,
    Rewind,
    StepRequests,
    TrainingRun,
)
from training.validation import EPOCH, STEP, Validation

if TYPE_CHECKING:  # it is loaded only if there are prompts
    from training.samples import Sampler

logger = logging.getLogger(__name__)


def make_phases(features: RunFeatures) -> LoopPhases:
    """Return the phases of the loop, each with what the features of the run put around it."""
    return LoopPhases(
        gradients=features.wrap(phases.GRADIENTS, compute_gradients),
        step=features.wrap(phases.STEP, step_weights),
        log=features.wrap(phases.LOG, log_report),
        validate=features.wrap(phases.VALIDATE, validate),
        sample=features.wrap(phases.SAMPLE, sample),
    )


def train(run: TrainingRun) -> bool:
    """Train from `run.progress` to the last step.

    Returns:
        False if the run was asked to end earlier.
    """
    progress = run.progress
    with run.requests.listen():
        if run.options.samples.sample_at_first or progress.sample_pending:
            _sample_before_training(run)
        if is_ending(run):  # before the first step there is nothing to save
            logger.info("Ended before step %d; run the same command to start again.", progress.step + 1)
            return False
        if progress.step == 0 and run.validation is not None:
            run.phases.validate(run, run.validation, STEP)
        while True:
            try:
                _train_epochs(run)
                break
            except Rewind as request:  # of a feature
                rewind(run, request)
            except Reread:
                run.rereads = False
        if is_ending(run):
            return False
        if run.saver is not None:
            run.reporter.log_pause(SAVING)
            run.saver.save_final()
    return True


def _train_epochs(run: TrainingRun) -> None:
    """Run all epochs from `run.progress` to the last one, unless the run must end before."""
    progress = run.progress
    _restart_step_timing(run)
    with contextlib.closing(run.feed.start(progress.epoch, progress.position)) as micro_batches:
        for epoch in range(progress.epoch, run.steps.num_epochs):
            run.model.trainable.start_epoch()
            first_step = progress.step
            for step_batches in run.steps.batches_by_step(epoch, progress.position):
                advance(run, step_batches, micro_batches)
                if is_ending(run) or run.reporter.is_done:
                    break
            else:
                # a resumed run may start at the very end of an epoch, whose work at its end is then still due
                if progress.step > first_step or progress.position >= run.steps.num_batches:
                    _after_epoch(run)
            if run.reporter.is_done or is_ending(run):
                break
    if not is_ending(run):
        _log_delayed(run)


def _sample_before_training(run: TrainingRun) -> None:
    """Generate the samples of --sample_at_first, or those that the resumed state had still to generate."""
    progress = run.progress
    if run.options.samples.sample_at_first and progress.step == 0 and progress.sampled_step != 0:
        progress.sample_pending = "e000000"  # named like the samples of an epoch
    if progress.sample_pending:
        run.phases.sample(run)


def advance(run: TrainingRun, step_batches: range, micro_batches: Iterator[NoisyBatch]) -> None:
    """Run one optimizer step and the work due after it."""
    requested = take_step(run, step_batches, micro_batches)
    progress = run.progress
    if run.memory is not None:
        run.memory.after_step()
    progress.step += 1
    progress.position = step_batches.stop
    _after_step(run, requested)
    if requested.ends:
        _end_if_requested(run)
    if run.rereads and not (is_ending(run) or run.reporter.is_done):
        raise Reread


def is_ending(run: TrainingRun) -> bool:
    """Return whether all processes have agreed to end the run before its last step."""
    return run.requests.ending_agreed and run.progress.step < run.steps.total_steps


def take_step(run: TrainingRun, step_batches: range, micro_batches: Iterator[NoisyBatch]) -> StepRequests:
    """Take one optimizer step on `step_batches`; return what was requested.

    1. Run the micro-batches forward and backward, and add up gradients and values over processes.
    2. Step the weights, unless a feature skips the step.
    3. Queue this step's values, log the values of the previous step, and return the requests.

    The step's loss, metrics and norms stay on the device in `values` and are read one step later, so that the
    host does not wait for the device. With several processes, the requests are also known one step later.
    """
    model = run.model
    model.trainable.start_step(run.progress.step)
    # read before the step, because the schedule advances with it
    rates = name_rates(model.schedule.get_last_lr(), model.trainable.group_names, model.optimizer)
    step = run.phases.gradients(run, step_batches, micro_batches)
    if not run.options.is_fused:
        step.norm = compute_gradient_norm(run.parameters, model.trainable.sharded_weights)
    try:
        run.phases.step(run, step)
    except UserError:  # of a feature: the numbers of the previous step are still on the device
        _log_delayed(run)
        raise
    assert step.norm is not None
    batches = run.feed.order.epoch(run.progress.epoch)
    # steps with equal sizes take equally long
    sizes = tuple(sorted(item.bucket for index in step_batches for item in batches[index]))
    report = StepReport(run.progress.step + 1, rates, step.keys, sizes, skipped=step.skipped)
    norms = [step.norm.detach().float().view(1)]
    if step.weight_norms is not None:
        norms.insert(0, step.weight_norms)
    previous = run.delayed_reports.push(report, torch.cat([step.values, *norms]))
    if previous is not None:
        run.phases.log(run, previous)
    if run.steps.num_processes == 1:
        run.requests.ending_agreed = run.requests.ending_requested
        return step.requested
    if previous is None:
        return StepRequests()
    # what any process was asked for until the previous step; all processes read the same sums
    _, saves, samples, ends = previous.values[REQUEST_COLUMNS]
    return StepRequests(saves=saves > 0, samples=samples > 0, ends=ends > 0)


def compute_gradients(
    run: TrainingRun, step_batches: range, micro_batches: Iterator[NoisyBatch]
) -> GradientStep:
    """Run the micro-batches of a step forward and backward; sum gradients and values over the processes."""
    requests = run.requests
    parameters = run.parameters
    if not run.updates_all_parameters:
        parameters = _find_updated_parameters(run, step_batches)
    values, keys = _accumulate(run, step_batches, micro_batches)
    # weights that a micro-batch could use, but that have no gradient, are stepped with a gradient of zero
    if not run.options.is_fused:  # otherwise weights were stepped, and gradients freed, in the backward pass
        fill_missing_gradients(parameters)
    if requests.is_requested(STOP):
        requests.finish(STOP)  # before the state is saved, so that the resumed run does not stop again
        requests.ending_requested = True
    is_due = requests.clock is not None and requests.clock.is_due()
    requested = StepRequests(
        saves=is_due or requests.is_requested(SAVE),
        samples=requests.is_requested(SAMPLE),
        ends=phases.END.name in requests.reasons,
    )
    if run.steps.num_processes > 1:
        numbers = [requests.ending_requested, requested.saves, requested.samples, requested.ends]
        values[REQUEST_COLUMNS] = tensor_on(run.device, numbers, torch.float32)
        sharded = run.model.trainable.sharded_weights
        values = sum_over_processes([each for each in parameters if each not in sharded], values)
    stepping = run.model.stepping
    if run.model.scaler.is_enabled() and isinstance(stepping, StepAfterBackward) and stepping.can_scale:
        run.model.scaler.unscale_(run.model.optimizer)
    return GradientStep(step_batches, parameters, values, keys, requested)


def _find_updated_parameters(run: TrainingRun, step_batches: range) -> list[Parameter]:
    """Return the parameters that a step on the micro-batches of `step_batches` changes."""
    # Experts without a batch in the step, audio parameters if no clip has audio, and parts whose training has
    # ended are left out. The result depends on the batches of all processes, and does not wait for the
    # device.
    trainable = run.model.trainable
    parameters = run.parameters
    if trainable.by_expert:
        parameters = []
        for expert in run.list_experts(step_batches):
            parameters += trainable.by_expert[expert]
    if run.audio_parameters and not run.has_audio(step_batches):
        parameters = [parameter for parameter in parameters if parameter not in run.audio_parameters]
    if trainable.freeze_at_step:
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
    return parameters


def step_weights(run: TrainingRun, step: GradientStep) -> GradientStep:
    """Step the weights, unless a feature skips the step, and the schedule; limit the weight norms."""
    model = run.model
    if isinstance(model.stepping, FusedBackward):  # for it, options reject features that skip steps
        step.norm = model.stepping.finish(step.parameters)
    elif step.skipped:
        run.progress.skipped += 1
        model.stepping.skip()
    else:
        assert step.norm is not None  # the gradients are complete
        model.stepping.step(step.norm)
    model.schedule.step()
    model.optimizer.zero_grad(set_to_none=True)
    if model.trainable.max_norm is not None:
        step.weight_norms = model.trainable.limit_norms(model.trainable.max_norm, run.device)
    return step


def _accumulate(
    run: TrainingRun, step_batches: range, micro_batches: Iterator[NoisyBatch]
) -> tuple[Tensor, tuple[str, ...]]:
    """Run this process's micro-batches of the step forward and backward, and accumulate their gradients."""
    # The LoRAs of --training_adapter are enabled meanwhile.
    steps = run.steps
    values = torch.zeros(run.metric_columns.size, device=run.device)
    keys: tuple[str, ...] = ()
    # processes that share a micro-batch have the same loss, and their gradients are summed too
    divisor = len(step_batches) * steps.processes_per_batch
    # only to initialize the scaler: a process without a micro-batch in this step needs it too
    run.model.scaler.scale(values)
    with contextlib.ExitStack() as stack:
        for adapter in run.model.dits.loras:
            stack.enter_context(adapter.switched_to(is_on=True))
        for position in range(len(steps.list_process_batches(step_batches, run.feed.process))):
            noisy_batch = next(micro_batches)
            # dropout depends on the number of the micro-batch
            seed_networks(run.model.trainable, run.progress.seed, noisy_batch.number, run.device)
            if run.memory is not None:
                run.memory.see_batch(noisy_batch.noise.numel())
            if run.plan.live_encoders is not None:
                noisy_batch = _encode_captions(run, run.plan.live_encoders, noisy_batch)
            noisy_batch = noisy_batch.to(run.device)
            passes = {noisy_batch.expert: False}  # expert -> whether its pass is a dummy
            if steps.in_lockstep:
                passes = _passes_in_lockstep(run, step_batches, position, noisy_batch.expert)
            for expert, is_dummy in passes.items():
                loss, stream_losses = _propagate(run, expert, noisy_batch, divisor=divisor, is_dummy=is_dummy)
                # values of dummy passes are taken too, but not used
                metrics = [(tally.names, tally.take()) for tally in run.features.tallies]
                if is_dummy:
                    continue
                keys += noisy_batch.batch.keys
                values[LOSS_COLUMN] += loss
                if run.loss_components:
                    _add_component_losses(
                        run, values, expert, loss=loss * divisor, stream_losses=stream_losses
                    )
                if metrics:
                    _add_feature_metrics(run, values, metrics)
    return values, keys


def _encode_captions(run: TrainingRun, encoders: LiveTextEncoders, noisy_batch: NoisyBatch) -> NoisyBatch:
    """Return a micro-batch with its captions encoded by the text encoders that run during training."""
    with run.autocast():
        return replace(noisy_batch, batch=encoders.add_encoded_captions(noisy_batch.batch))


def _propagate(
    run: TrainingRun, expert: int, noisy_batch: NoisyBatch, *, divisor: int, is_dummy: bool
) -> tuple[Tensor, StreamErrors]:
    """Run a micro-batch forward and backward through an expert to accumulate its gradients."""
    dit = run.model.dits.on_device(expert)
    strength: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if noisy_batch.batch.network_multiplier != 1:
        strength = run.model.trainable.at_strength(noisy_batch.batch.network_multiplier)
    total: Tensor | None = None
    stream_losses: StreamErrors = ()
    with strength:
        for losses in loss_passes(run.family, dit, noisy_batch, autocast=run.autocast, rule=run.rule):
            loss = functools.reduce(torch.add, losses) / divisor
            # clips without audio give no gradient for an audio-only network, whose weights do not change then
            if loss.requires_grad:
                run.model.scaler.scale(0 * loss if is_dummy else loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
            detached = tuple(stream.detach() for stream in losses)
            stream_losses = tuple(map(torch.add, stream_losses, detached)) if stream_losses else detached
    assert total is not None  # `loss_passes` yields at least once
    return total, stream_losses


def _passes_in_lockstep(run: TrainingRun, step_batches: range, position: int, expert: int) -> dict[int, bool]:
    """Return the passes that all processes run at this position of the step, because they share a model."""
    # A dummy pass adds no gradients: it runs because other processes need this process's part of the blocks.
    steps = run.steps
    indexes = [
        steps.list_process_batches(step_batches, process)[position]
        for process in range(steps.data_parallel_size)
    ]
    experts = [expert]
    if len(run.family.experts) > 1:
        experts = sorted({run.feed.find_expert((run.progress.epoch, index)) for index in indexes})
    # a process that lacks a micro-batch of its own repeats the last one of another process
    is_repeat = indexes[run.feed.process] % steps.data_parallel_size != run.feed.process
    return {each: is_repeat or each != expert for each in experts}


def _add_component_losses(
    run: TrainingRun, values: Tensor, expert: int, *, loss: Tensor, stream_losses: tuple[Tensor, ...]
) -> None:
    """Add the losses of a micro-batch that are also logged separately: of its expert, or of images and audio.

    Args:
        run: The run.
        values: Values of the step, changed in place.
        expert: Index of the expert.
        loss: Loss of the micro-batch.
        stream_losses: Losses of images and of audio, which together are `loss`.
    """
    has_experts = len(run.family.experts) > 1
    component_losses = {expert: loss} if has_experts else dict(enumerate(stream_losses))
    for index, component_loss in component_losses.items():
        values[run.metric_columns.sum_columns.start + index] += component_loss.detach()
        values[run.metric_columns.count_columns.start + index] += 1


def _add_feature_metrics(
    run: TrainingRun, values: Tensor, metrics: Sequence[tuple[tuple[str, ...], Tensor | None]]
) -> None:
    """Add the metrics that features recorded for a micro-batch to the values of the step."""
    columns = run.metric_columns
    for names, recorded in metrics:
        if recorded is not None:
            first = columns.names.index(names[0])
            feature_columns = slice(first, first + len(names))
            values[columns.sum_columns][feature_columns] += recorded
            values[columns.count_columns][feature_columns] += 1


def _log_delayed(run: TrainingRun) -> None:
    """Log the last step now, whose values are otherwise read one step late."""
    report = run.delayed_reports.flush()
    if report is not None:
        run.phases.log(run, report)


def log_report(run: TrainingRun, step: StepReport) -> StepReport:
    """Complete the report of a step, whose values have arrived on the host; log it, and return it."""
    loss = step.values[LOSS_COLUMN]
    norm = step.values[GRADIENT_NORM_COLUMN]
    is_finite = math.isfinite(loss) and math.isfinite(norm)
    # Infinite losses are normal while a gradient scaler searches its scale; a skipped step changed nothing.
    if not is_finite and not run.model.scaler.is_enabled() and not step.skipped:
        raise explain_bad_step(step.step, loss, norm, step.keys, remedy=bad_step_remedies())
    losses = run.progress.losses
    if math.isfinite(loss):  # otherwise it was expected, as said above
        losses.append(loss)
    del losses[: -run.steps.steps_per_epoch]  # the average is over the steps of one epoch
    if run.steps.num_processes > 1:
        num_ending, *_ = step.values[REQUEST_COLUMNS]  # processes that were asked to end the run
        run.requests.ending_agreed = run.requests.ending_agreed or num_ending > 0
    average = sum(losses) / max(len(losses), 1)
    report = replace(step, loss=loss, average=average, gradient_norm=norm)
    if run.model.trainable.max_norm is not None:
        report = replace(report, norms=NormReport.of(step.values[WEIGHT_NORM_COLUMNS]))
    if run.metric_columns.names:
        # means of the losses of its parts, and of the metrics of features
        component_losses: dict[str, float] = {}
        metrics: dict[str, float] = {}
        for name, mean in run.metric_columns.means(report.values).items():
            kind = component_losses if name in run.loss_components else metrics
            kind[name] = mean
        report = replace(report, component_losses=component_losses, metrics=metrics)
    run.logs.log_step(report)
    run.reporter.log_step(report, run.logs.clock.estimate_remaining(report.step, run.steps.total_steps))
    return report


def _restart_step_timing(run: TrainingRun) -> None:
    """Leave the pause until now out of the duration of the next step."""
    if run.memory is not None:
        run.memory.after_pause()
    run.delayed_reports.last_time_stamp = run.delayed_reports.time_stamp(run.device.type)
    run.logs.clock.skips_next_step = True


def _after_step(run: TrainingRun, requested: StepRequests) -> None:
    """Validate, generate samples and save after an optimizer step, whichever of them are due."""
    # Samples come before saving. If a user has asked the run to end, its samples are only recorded as
    # pending, and generated after resuming.
    progress = run.progress
    # work is due because a user asked for it, because the run ends, or by the options
    saves = requested.saves or is_ending(run) or _is_due(run.plan.saving.save_every_n_steps, progress.step)
    validates = _is_due(run.options.validation.validate_every_n_steps, progress.step)
    samples = requested.samples or _is_due(run.options.samples.sample_every_n_steps, progress.step)
    if not (saves or validates or samples):
        return
    _log_delayed(run)
    if validates and run.validation is not None:
        run.phases.validate(run, run.validation, STEP)
        _end_if_requested(run)
    if samples:
        progress.sample_pending = f"{progress.step:06d}"
        if not is_ending(run):
            run.phases.sample(run)
    if is_ending(run):  # perhaps only since the samples were stopped
        _save_for_resuming(run)
    elif saves:
        # Save the step's files, and restart the clock of --save_every_n_minutes
        if run.requests.clock is not None:
            run.requests.clock.restart()
        if run.saver is not None:
            run.reporter.log_pause(SAVING)
            with run.logs.clock.pause(SAVING):
                run.saver.save_step(run.progress.step)
    if requested.saves:
        run.requests.finish(SAVE)
    if requested.samples:
        run.requests.finish(SAMPLE)
    _restart_step_timing(run)


def _is_due(every: int | None, count: int) -> bool:
    """Return whether `count` steps or epochs complete an interval of `every`; False if `every` is None."""
    return every is not None and count % every == 0


def _after_epoch(run: TrainingRun) -> None:
    """Do the work due at the end of an epoch: validate, save, then sample."""
    # An epoch cut short by --max_train_steps counts as unfinished.
    progress = run.progress
    epoch = progress.epoch + 1
    is_complete = progress.position >= run.steps.num_batches  # otherwise --max_train_steps ended the epoch
    _log_delayed(run)
    if run.logs.recorders:
        mean_loss = sum(progress.losses) / max(len(progress.losses), 1)
        run.logs.log_values({"loss/epoch": mean_loss}, progress.step)
    samples = _is_due(run.options.samples.sample_every_n_epochs, epoch)
    if samples and progress.sampled_step != progress.step:  # otherwise the step has its samples already
        progress.sample_pending = f"e{epoch:06d}"
    if is_complete:
        progress.epoch = epoch
        progress.position = 0
    is_due = _is_due(run.plan.saving.save_every_n_epochs, epoch)
    saves = is_complete and is_due and epoch < run.steps.num_epochs  # the last epoch is the final file
    step = run.progress.step
    is_saved = saves or step >= run.steps.total_steps  # the last step is saved as the final file
    # before saving: what follows from the loss belongs to the state
    if run.validation is not None and run.options.validation.is_due_after_epoch(
        epoch, step, run.steps.steps_per_epoch, is_saved
    ):
        run.phases.validate(run, run.validation, EPOCH)
        _end_if_requested(run)
    if saves and run.saver is not None:
        run.reporter.log_pause(SAVING)
        with run.logs.clock.pause(SAVING):
            run.saver.save_epoch(epoch)
    if progress.sample_pending:
        run.phases.sample(run)
    if is_ending(run):
        _save_for_resuming(run)
    _restart_step_timing(run)


def _save_for_resuming(run: TrainingRun) -> None:
    """Save a state after Ctrl-C or a request to end."""
    if run.saver is not None:
        run.reporter.log_pause(SAVING)
        run.saver.save_step(run.progress.step, with_state=True)
    logger.info(
        "Ended after step %d of %d; continue with --resume latest-or-fail.",
        run.progress.step,
        run.steps.total_steps,
    )


class SamplingStopped(Exception):
    """Raised between two steps of a sample when the run is asked to end."""


def sample(run: TrainingRun) -> None:
    """Generate the samples that `progress.sample_pending` names, and record that they are no longer pending.

    If the run is asked to end in the meantime, it ends at this step and the samples stay pending: the resumed
    run generates them with the weights of the same step.
    """
    progress = run.progress
    if run.sampler is not None:
        was_stopped = not _make_samples(run, run.sampler)
        if reduce_max(was_stopped, run.steps.num_processes, run.device):
            logger.info("Samples of step %d will be made after resuming.", progress.step)
            run.requests.ending_agreed = True  # `reduce_max` had the same result in all processes
            return
        run.reporter.log_samples(
            progress.step,
            progress.sample_pending,
            prompts=run.sampler.prompts,
            strengths=run.sampler.strengths,
            recorders=run.logs.recorders if run.is_main else (),
        )
    progress.sample_pending = ""  # nothing is pending any more
    progress.sampled_step = progress.step


def _make_samples(run: TrainingRun, sampler: "Sampler") -> bool:
    """Generate the pending samples from the current content of the prompt file."""
    from training.edited_prompts import take_edited_prompts  # only with prompts

    model = run.model
    # processes that make each sample together also have to stop together
    num_together = run.steps.num_processes if run.steps.works_together else 1

    def raise_if_stopped() -> None:
        if reduce_max(run.requests.ending_requested, num_together, run.device):
            raise SamplingStopped

    pause = run.logs.clock.pause(SAMPLES)
    in_evaluation = evaluation(model.modules, model.optimizer, run.parameters)
    try:
        with pause:
            sampler = take_edited_prompts(sampler, run.steps.num_processes, run.reporter.log_pause)
            run.sampler = sampler
            if sampler.samples:
                run.reporter.log_pause(f"sample 1 of {len(sampler.samples)}")
            with in_evaluation, contextlib.ExitStack() as stack:
                for loras in model.sample_dits.loras:  # of --sample_lora
                    stack.enter_context(loras.switched_on(run.device, model.compute_dtype))
                sampler.make(
                    model.sample_dits.on_device,
                    run.autocast,
                    step_label=run.progress.sample_pending,
                    check=raise_if_stopped,
                    show_progress=run.reporter.log_activity,
                    at_strength=model.trainable.at_strength,
                )
    except SamplingStopped:
        return False
    return True


def validate(run: TrainingRun, validation: Validation, occasion: str) -> Mapping[str, float]:
    """Measure and log the validation losses; return them by name.

    `occasion` is STEP or EPOCH, which is a part of the names of logged values.
    """
    in_evaluation = evaluation(run.model.modules, run.model.optimizer, run.parameters)
    run.reporter.log_pause("validating")
    with run.logs.clock.pause(VALIDATION), in_evaluation:
        losses = validation.measure(run.model.dits.on_device, run.autocast)
    step = run.progress.step
    training_losses = run.progress.losses
    training_loss = sum(training_losses) / len(training_losses) if training_losses else None
    run.logs.log_values(validation.name_tracked_values(losses, occasion, training_loss), step)
    earlier_losses = dict(run.reporter.validations)
    run.reporter.log_validation(step, losses)
    # the console gets only the mean; losses of single levels are on the page and in the trackers
    recorded = run.reporter.validations.get(step, losses[LOSS])  # rounded, like the earlier ones
    # Log a validation loss with the previous one, and whether it is the lowest; losses are keyed by step
    previous, remark = "", ""
    if earlier_losses:
        previous = f"{earlier_losses[max(earlier_losses)]:.5f} -> "
        if recorded < min(earlier_losses.values()):
            remark = ", the lowest so far"
    logger.info("Step %d: validation loss %s%.5f%s", step, previous, recorded, remark)
    lowered = run.model.schedule.observe(step, losses[LOSS])
    if lowered:
        run.note(lowered)
    return losses


def _end_if_requested(run: TrainingRun) -> None:
    """End the run, as after its last step, if a feature of any process asks for it; all must call this."""
    step, reason = run.progress.step, run.requests.reasons.get(phases.END.name)
    if reduce_max(reason is not None, run.steps.num_processes, run.device) and step < run.steps.total_steps:
        reason = reason or "another process has asked for it"
        logger.info("Ended after step %d of %d: %s.", step, run.steps.total_steps, reason)
        run.reporter.is_done = True
