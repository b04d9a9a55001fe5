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
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from modules.devices import numbers_on
from modules.errors import UserError
from modules.seeds import derive_seed
from networks.adapter import ForeignNetwork, NormReport
from training.loss import NoisyBatch, training_losses
from training.optimizers.optimizer import evaluation
from training.processes import fill_missing_gradients, largest_of_processes, sum_over_processes
from training.reports.history import LOSS
from training.reports.logs import WISHES, StepReport, name_rates
from training.reports.pauses import SAMPLES, SAVING, VALIDATION
from training.training_run import SAMPLE, SAVE, STOP, TrainingRun
from training.validation import EPOCH, STEP, Validation

logger = logging.getLogger(__name__)


Asked = tuple[bool, bool]  # whether all processes agree to save, and to sample, after a step


def train(run: TrainingRun) -> bool:
    """Train from `run.progress` to the last step.

    Returns False if the run was asked to end before.
    """
    progress, plan = run.progress, run.steps
    with run.requests.listen():
        # what is due before the first step, or was left over when the resumed state was saved
        if progress.step == 0 and run.options.samples.sample_at_first and progress.sampled_step != 0:
            progress.sample_pending = "e000000"
        if progress.sample_pending:
            _sample(run)
        if is_ending(run):  # nothing has changed since the resumed state, so there is nothing to save
            logger.info("Ended before step %d; run the same command to start again.", progress.step + 1)
            return False
        if progress.step == 0 and run.validation is not None:
            _validate(run, run.validation, STEP)
        _restart_clock(run)
        with contextlib.closing(run.feed.start(progress.epoch, progress.position)) as micro_batches:
            for epoch in range(progress.epoch, plan.num_epochs):
                run.model.trainable.start_epoch()
                first_step = progress.step
                for group in plan.groups(epoch, progress.position):
                    if advance(run, group, micro_batches):
                        return False
                if progress.step > first_step or progress.position >= plan.num_batches:
                    _after_epoch(run)
                if is_ending(run):
                    return False
        _note(run, run.readings.flush())
        if run.saver is not None:
            run.saver.save_final()
    return True


def advance(run: TrainingRun, group: range, micro_batches: Iterator[NoisyBatch]) -> bool:
    """Take a step and do the work due after it. Returns whether the run has to end here."""
    asked = take_step(run, group, micro_batches)
    progress = run.progress
    if run.memory is not None:
        run.memory.after_step()
    progress.step, progress.position = progress.step + 1, group.stop
    _after_step(run, asked)
    return is_ending(run)


def is_ending(run: TrainingRun) -> bool:
    return run.requests.agreed and run.progress.step < run.steps.total_steps


def take_step(run: TrainingRun, group: range, micro_batches: Iterator[NoisyBatch]) -> Asked:
    """Take one optimizer step on the micro-batches of `group`. Returns the requests of clock and files."""
    progress, feed, trainable = run.progress, run.feed, run.model.trainable
    for network in trainable.all_networks:
        if isinstance(network, ForeignNetwork):
            network.on_step_start()
    # before any weight is stepped
    rates = name_rates(run.model.schedule.get_last_lr(), trainable.group_names, run.model.optimizer)
    # The step changes all parameters but those of an expert that gets no batch of it, and those of the sound
    # if no clip has any. It depends on the whole group, not on this process' share of it, and costs no wait
    # for the device.
    reached, places = run.parameters, [(progress.epoch, index) for index in group]
    if trainable.by_expert:
        experts = sorted({feed.expert_of(place) for place in places})
        reached = [parameter for expert in experts for parameter in trainable.by_expert[expert]]
    if run.of_sound and not any(map(feed.has_sound, places)):
        reached = [parameter for parameter in reached if parameter not in run.of_sound]
    with contextlib.ExitStack() as stack:
        for adapter in run.model.adapters:
            stack.enter_context(adapter.switched_to(is_on=True))
        row, keys = _accumulate(run, group, micro_batches)
    if not run.options.is_fused:  # else most weights are stepped already
        fill_missing_gradients(reached)
    is_alone = run.steps.everyone == 1
    if run.requests.asks_for(STOP):
        run.requests.finish(STOP)  # at once: the run that goes on from here was not asked
        run.requests.ends = True
    is_due = run.clock is not None and run.clock.is_due()
    here = (is_due or run.requests.asks_for(SAVE), run.requests.asks_for(SAMPLE))
    if not is_alone:
        wishes = [run.requests.ends, *here]
        row[WISHES] = numbers_on(run.device, wishes, torch.float32)
        whole = [parameter for parameter in reached if parameter not in trainable.split]
        row = sum_over_processes(whole, row)
    norm = run.model.stepping.finish().detach().float()  # of the gradients before clipping
    run.model.schedule.step()
    run.model.optimizer.zero_grad(set_to_none=True)
    norms = [] if trainable.max_norm is None else [trainable.limit_norms(trainable.max_norm, run.device)]
    if run.model.average is not None:
        run.model.average.after_step()
    items = feed.order.epoch(progress.epoch)
    sizes = tuple(sorted(item.bucket for index in group for item in items[index]))
    step = StepReport(progress.step + 1, rates, keys, sizes)
    before = run.readings.push(step, torch.cat([row, *norms, norm.view(1)]))
    _note(run, before)
    if is_alone:
        run.requests.agreed = run.requests.ends
        return here
    # processes must agree, so this is what was asked for during the previous step: all have read it by now
    _, saves, samples = before.row[WISHES] if before is not None else (0, 0, 0)
    return saves > 0, samples > 0


def _accumulate(
    run: TrainingRun, group: range, micro_batches: Iterator[NoisyBatch]
) -> tuple[Tensor, tuple[str, ...]]:
    """Accumulate the gradients of this process' share of the group.

    Returns its part of the step's row (see `reports/logs.py`), on the device, and the keys of its items.
    """
    count, steps, progress = len(run.parts), run.steps, run.progress
    row = torch.zeros(WISHES.stop + 2 * count, device=run.device)
    keys: tuple[str, ...] = ()
    parts = len(group) * run.steps.peers  # gradients of peers, who have the same loss, are summed too
    # the first use sets it up; a process without a micro-batch in this step needs that too
    run.model.scaler.scale(row)
    for place, index in enumerate(steps.share(group, run.feed.process)):
        noisy_batch = next(micro_batches)
        # dropout is a function of the seed and the micro-batch
        seed = derive_seed(progress.seed, "dropout", noisy_batch.number)
        for network in run.model.trainable.all_networks:
            network.set_dropout_seed(seed)
        # the global generators are for networks that use them; torch.manual_seed itself would record the call
        # for device types that are not in use
        seed = derive_seed(progress.seed, "global", noisy_batch.number)
        torch.default_generator.manual_seed(seed)
        if run.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif run.device.type == "mps":
            torch.mps.manual_seed(seed)
        if run.memory is not None:
            run.memory.see_batch(noisy_batch.noise.numel())
        if run.plan.texts is not None:
            with run.autocast():
                noisy_batch = replace(noisy_batch, batch=run.plan.texts.add_to(noisy_batch.batch))
        noisy_batch, expert = noisy_batch.to(run.device), noisy_batch.expert
        is_repeat = steps.in_lockstep and index % steps.processes != run.feed.process  # another's own
        experts = [expert]
        if len(run.family.experts) > 1 and steps.in_lockstep:  # experts of all processes in this pass
            now = [steps.share(group, process)[place] for process in range(steps.processes)]
            experts = sorted({run.feed.expert_of((progress.epoch, other)) for other in now})
        for which in experts:
            dit = run.model.dits.at(which)
            losses = training_losses(run.family, dit, noisy_batch, run.autocast, run.rule)
            loss = functools.reduce(torch.add, losses) / parts
            if is_repeat or which != expert:
                # for the others, which gather the blocks from this process
                run.model.scaler.scale(0 * loss).backward()
                continue
            run.model.scaler.scale(loss).backward()
            row[0] += loss.detach()
            by_part = {expert: loss * parts} if len(run.family.experts) > 1 else dict(enumerate(losses))
            for part, value in by_part.items() if count else ():
                row[WISHES.stop + part] += value.detach()
                row[WISHES.stop + count + part] += 1
            keys += noisy_batch.batch.keys
    return row, keys


def _note(run: TrainingRun, step: StepReport | None) -> None:
    """Log a step, if there is one.

    Raises UserError if its loss or gradient norm is NaN or infinite, before anything made from it is saved.
    """
    if step is None:
        return
    loss, norm = step.row[0], step.row[-1]
    if not (math.isfinite(loss) and math.isfinite(norm)) and not run.model.scaler.is_enabled():
        keys = ", ".join(step.keys)
        items = f" The items of this process in that step: {keys}." if keys else ""
        raise UserError(
            f"step {step.step}: the loss is {loss}, the gradient norm {norm}; nothing of this step was "
            f"saved.{items}\n"
            "  Lower --learning_rate, or look for a damaged clip among these items, and continue with "
            "--resume latest-or-fail."
        )
    losses = run.progress.losses
    if math.isfinite(loss):  # a gradient scaler skips other steps until it has found its scale
        losses.append(loss)
    del losses[: -run.steps.steps_per_epoch]
    if run.steps.everyone > 1:
        run.requests.agreed = run.requests.agreed or step.row[WISHES][0] > 0
    # the mean losses of the parts that had micro-batches in this step
    count, numbers = len(run.parts), step.row[WISHES.stop :]
    parts = zip(run.parts, numbers[:count], numbers[count : 2 * count], strict=True)
    report = replace(
        step,
        loss=loss,
        average=sum(losses) / max(len(losses), 1),
        gradient_norm=norm,
        norms=None if run.model.trainable.max_norm is None else NormReport.of(step.row[-4:-1]),
        by_part={name: total / batches for name, total, batches in parts if batches},
    )
    run.logs.step(report)
    run.reporter.note_step(report, run.logs.clock.left(report.step, run.steps.total_steps))


def _restart_clock(run: TrainingRun) -> None:
    if run.memory is not None:
        run.memory.after_pause()
    run.readings.last = run.readings.moment(run.device.type)
    run.logs.clock.skips = True


def _after_step(run: TrainingRun, asked: Asked) -> None:
    """Do the work due after an optimizer step.

    Samples come before saving. If the run is to end, its samples are generated after resuming.
    """
    progress, options = run.progress, run.options
    asks_to_save, asks_to_sample = asked
    every, validate_every = run.plan.saving.save_every_n_steps, options.validation.validate_every_n_steps
    saves = asks_to_save or is_ending(run) or (every is not None and progress.step % every == 0)
    validates = validate_every is not None and progress.step % validate_every == 0
    sample_every = options.samples.sample_every_n_steps
    samples = asks_to_sample or (sample_every is not None and progress.step % sample_every == 0)
    if not (saves or validates or samples):
        return
    _note(run, run.readings.flush())
    if validates and run.validation is not None:
        _validate(run, run.validation, STEP)
    if samples:
        progress.sample_pending = f"{progress.step:06d}"
        if not is_ending(run):
            _sample(run)
    if is_ending(run):
        _save_to_go_on(run)
    elif saves:
        if run.clock is not None:
            run.clock.restart()
        if run.saver is not None:
            with run.logs.clock.pause(SAVING):
                run.saver.save_step(progress.step)
    for kind, is_done in ((SAVE, asks_to_save), (SAMPLE, asks_to_sample)):
        if is_done:
            run.requests.finish(kind)
    _restart_clock(run)


def _after_epoch(run: TrainingRun) -> None:
    """Do the work due at the end of an epoch: save, then sample.

    An epoch cut short by --max_train_steps stays unfinished.
    """
    progress, options = run.progress, run.options
    epoch = progress.epoch + 1
    is_whole = progress.position >= run.steps.num_batches
    _note(run, run.readings.flush())
    run.logs.values({"loss/epoch": sum(progress.losses) / max(len(progress.losses), 1)}, progress.step)
    sample_every = options.samples.sample_every_n_epochs
    if sample_every is not None and epoch % sample_every == 0 and progress.sampled_step != progress.step:
        progress.sample_pending = f"e{epoch:06d}"
    if is_whole:
        progress.epoch, progress.position = epoch, 0
    every, is_last = run.plan.saving.save_every_n_epochs, progress.step >= run.steps.total_steps
    saves = is_whole and every is not None and epoch % every == 0 and epoch < run.steps.num_epochs
    if saves and run.saver is not None:
        with run.logs.clock.pause(SAVING):
            run.saver.save_epoch(epoch)
    if progress.sample_pending:
        _sample(run)
    if is_ending(run):
        _save_to_go_on(run)
    elif run.validation is not None and options.validation.is_due_after_epoch(
        epoch, progress.step, run.steps.steps_per_epoch, saves or is_last
    ):
        _validate(run, run.validation, EPOCH)
    _restart_clock(run)


def _save_to_go_on(run: TrainingRun) -> None:
    if run.saver is not None:
        run.saver.save_step(run.progress.step, with_state=True)
    logger.info(
        "Ended after step %d of %d; continue with --resume latest-or-fail.",
        run.progress.step,
        run.steps.total_steps,
    )


class SamplingStopped(Exception):
    """Raised between two steps of a sample when the run is asked to end."""


def _sample(run: TrainingRun) -> None:
    """Make the pending samples.

    If the run is asked to end meanwhile, it ends at this step and the samples stay pending: the resumed run
    makes them with the weights of the same step.
    """
    progress, sampler = run.progress, run.sampler
    if sampler is not None:
        was_stopped, together = False, run.steps.everyone if run.steps.works_together else 1

        def check() -> None:
            if largest_of_processes(run.requests.ends, together, run.device):
                raise SamplingStopped

        mark, tell = progress.sample_pending, run.reporter.note_doing
        timed, model = run.logs.clock.pause(SAMPLES), run.model
        ready = evaluation(model.modules, model.optimizer, run.parameters)
        try:
            with timed, ready, _as_sampled(run):
                sampler.make(model.sample_dits.at, run.autocast, mark, check, tell)
        except SamplingStopped:
            was_stopped = True
        if largest_of_processes(was_stopped, run.steps.everyone, run.device):
            logger.info("Samples of step %d will be made after resuming.", progress.step)
            run.requests.agreed = True
            return
        run.reporter.note_samples(progress.step, progress.sample_pending)
    progress.sample_pending, progress.sampled_step = "", progress.step


@contextlib.contextmanager
def _as_sampled(run: TrainingRun) -> Iterator[None]:
    """Use --sample_lora, and with --sample_ema the averaged weights, during the block."""
    with contextlib.ExitStack() as stack:
        for loras in run.model.sample_loras:
            stack.enter_context(loras.switched_on(run.device, run.model.compute_dtype))
        if run.options.average.sample_ema and run.model.average is not None:
            stack.enter_context(run.model.average.in_place())
        yield


def _validate(run: TrainingRun, validation: Validation, occasion: str) -> None:
    ready = evaluation(run.model.modules, run.model.optimizer, run.parameters)
    with run.logs.clock.pause(VALIDATION), ready:
        losses = validation.measure(run.model.dits.at, run.autocast)
    step, past, loss = run.progress.step, run.progress.losses, losses[LOSS]
    running = sum(past) / len(past) if past else None
    run.logs.values(validation.logged(losses, occasion, running), step)
    # levels are on the page and in the trackers
    earlier = run.reporter.validations  # losses by their steps
    before = f"{earlier[max(earlier)]:.5f} -> " if earlier else ""
    lowest = ", the lowest so far" if earlier and loss < min(earlier.values()) else ""
    logger.info("Step %d: validation loss %s%.5f%s", step, before, loss, lowest)
    run.reporter.note_validation(step, losses)
