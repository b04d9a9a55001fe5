"""Show the boxes of a training run, its plan and its result, and collect the facts for its page."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modules.atomic_write import free_bytes
from modules.command import as_typed
from modules.console import Row, as_size, count_of, in_words, show_box
from modules.devices import gib, host_peak, peak_in_words
from modules.installation import RUN_GOES_ON
from modules.planning.device_memory import MemoryWatch
from modules.text_files import real_path
from networks.lora_settings import DEFAULT_RANK
from networks.metadata import of_numbers
from networks.options import NetworkOptions
from training.checks import judge_rate
from training.following import DORA_ELSEWHERE, NextSteps
from training.metadata import continued_sizes
from training.options import RANKED_NETWORKS, TrainingOptions
from training.plan import TrainingPlan
from training.reports import history
from training.reports.page import page_path
from training.reports.pauses import SAMPLES, SAVING, VALIDATION
from training.reports.reporter import RunReporter
from training.reports.sample_files import FOLDER
from training.run_options import LEAST_STEPS, SampleOptions
from training.saving.options import SavingOptions
from training.steps import StepPlan
from training.training_run import TrainingRun

if TYPE_CHECKING:  # it is loaded only if there are prompts
    from training.samples import Sampler

MOMENTS_BYTES = 8  # of AdamW's two moments, for each trained weight; other optimizers keep less
FLOAT_BYTES = 4  # states are saved in float32
LOW_STRENGTH = 0.1  # a lower alpha / rank gets a remark
SPARE = 1.05  # a disk with less room than this times what the run will write is warned of


def count_saves(
    options: SavingOptions, plan: StepPlan, first_step: int, first_epoch: int = 0
) -> tuple[int, int]:
    """Return how many models and states are on disk when a run is over. Saves by the clock are left out.

    first_step: only saves after this step count. first_epoch: the first epoch that is not finished then.
    """
    models = 0
    if options.save_every_n_steps is not None:
        every = options.save_every_n_steps
        kept = plan.total_steps // every - first_step // every
        if options.save_last_n_steps is not None:
            kept = min(kept, options.save_last_n_steps // every + 1)
        models += kept
    if options.save_every_n_epochs is not None:
        every = options.save_every_n_epochs
        kept = (plan.num_epochs - 1) // every - first_epoch // every
        if options.save_last_n_epochs is not None:
            kept = min(kept, options.save_last_n_epochs)
        models += max(0, kept)
    return models + 1, (models if options.save_state else 0) + options.saves_state_at_end


def saved_bytes(
    parameters: Sequence[Tensor], dtype: torch.dtype | None, has_average: bool = False
) -> tuple[int, int]:
    """Return the bytes of one model, with its average (EMA), and of one state.

    parameters: the trained ones. dtype: of saved models; None: as they are.
    """
    model = sum(one.numel() * (dtype or one.dtype).itemsize for one in parameters)
    count, average = sum(one.numel() for one in parameters), FLOAT_BYTES if has_average else 0
    return model * (1 + has_average), count * (FLOAT_BYTES + MOMENTS_BYTES + average)


def show_start(run: TrainingRun, dtype: torch.dtype | None) -> None:
    """Show the plan of the run. dtype: of saved models; None: as they are."""
    plan, options, steps, trainable = run.plan, run.options, run.steps, run.model.trainable
    parameters = [trainable.split.get(one, one) for one in trainable.parameters]  # whole ones of their rows
    network, whole, saving, samples = options.network, options.whole_dit, plan.saving, options.samples
    if network is not None:
        continued = any(continued_sizes(run.model, part) for part in run.model.trainable.writes)
        sizes = run.model.trainable.sizes() if continued else None
        rank = (
            f"rank {network.network_dim or DEFAULT_RANK}" if sizes is None else of_numbers("rank", sizes[0])
        )
        learner = f"{plan.network_module}, {rank}{'' if sizes is None else ' of the file'}"
    else:
        parts = whole.name_parts if whole is not None else ()
        learner = f"of the model: {' '.join(parts)}" if parts else "the whole model"
    length = f"{steps.total_steps} in {count_of(steps.num_epochs, 'epoch')} of {steps.steps_per_epoch}"
    if steps.total_steps < steps.steps_per_epoch:
        length = f"{steps.total_steps}, of the {steps.steps_per_epoch} of an epoch"
    begun = f", from step {plan.progress.step + 1} on" if plan.progress.step else ""
    held_back = f", {count_of(len(plan.validation), 'item')} for validation" if plan.validation else ""
    known = ("architecture", "task", "sd_model_name")
    model = [text for name, text in plan.family.metadata.items() if text and name.startswith(known)]
    every = {"steps": saving.save_every_n_steps, "epochs": saving.save_every_n_epochs}
    saves = _times({**every, "minutes": saving.save_every_n_minutes})
    sampling = ["before the first step"] if samples.sample_at_first else []
    sampling += _times({"steps": samples.sample_every_n_steps, "epochs": samples.sample_every_n_epochs})
    has_samples = samples.sample_prompts is not None and samples.is_timed
    written = saved_bytes(parameters, dtype, options.average.ema_decay is not None)
    counts = count_saves(saving, steps, plan.progress.step, plan.progress.epoch)
    items = count_of(plan.order.num_items, "item")
    rows: list[Row] = [
        ("model", ", ".join(model)),
        ("learns", f"{learner}, {count_of(sum(one.numel() for one in parameters), 'weight')}"),
        ("alpha", None if network is None else judge_alpha(network, sizes)),
        ("data", f"{items} with repeats{held_back}, {count_of(steps.num_batches, 'batch')}"),
        ("steps", f"{length}{begun}"),
        ("learning rate", judge_rate(options)),
        ("optimizer", f"{options.optimizer.optimizer_type or 'AdamW'}, seed {plan.progress.seed}"),
        ("saves", " and ".join([*saves, "at the end"])),
        ("samples", f"{' and '.join(sampling)}, from {samples.sample_prompts}" if has_samples else None),
        ("disk", disk_needed(plan.names.folder, counts, written)),
        ("folder", str(plan.names.folder)),
        ("page", None if options.logs.no_page else str(page_path(plan.names.folder, plan.names.name))),
    ]
    show_box(f"Training {plan.names.name}", rows)


def _times(every: Mapping[str, float | None]) -> list[str]:
    """Return texts such as "every 5 epochs". every: unit -> number; None is left out."""
    return [
        f"every {unit.removesuffix('s')}" if number == 1 else f"every {number:.12g} {unit}"
        for unit, number in every.items()
        if number is not None
    ]


def show_end(run: TrainingRun, story: history.Story, following: NextSteps) -> None:
    """Show the result of a finished run, and the commands that can follow."""
    names, clock, losses = run.plan.names, run.logs.clock, run.progress.losses
    network = run.options.network
    seconds, samples = clock.seconds_per_step, names.folder / FOLDER
    speed = "" if seconds is None else f" ({seconds:.3g} s a step)"
    peak = peak_in_words(run.device)
    if run.memory is not None:
        peak = f"{gib(run.memory.highest)} GiB"
    rows: list[Row] = [
        *(
            ("result", f"{path} ({as_size(path.stat().st_size)})" if path.exists() else None)
            for path in names.files(names.name).values()
        ),
        ("best by validation", describe_best(story, names.folder) if story.validations else None),
        ("steps", f"{clock.steps} in {in_words(clock.active)}{speed}, without pauses"),
        ("average loss", f"{sum(losses) / len(losses):.4g}" if losses else None),
        ("samples", str(samples) if run.sampler is not None and samples.is_dir() else None),
        ("page", None if run.options.logs.no_page else str(page_path(names.folder, names.name))),
        ("peak memory", peak),
        ("other tools", DORA_ELSEWHERE if network is not None and network.decomposes else None),
        ("commands", f"typed in {Path.cwd()}" if os.environ.get(RUN_GOES_ON) else None),
    ]
    best = story.best_file(names.folder)
    *chosen, _ = following.commands(None if best is None else names.folder / best, is_finished=True)
    commands: list[Row] = [
        (command.title, command.powershell if sys.platform == "win32" else command.bash) for command in chosen
    ]
    if run.options.logs.logging_dir is not None:
        board = as_typed(["tensorboard", "--logdir", str(run.options.logs.logging_dir)])
        commands.append(("Look at the curves", board))
    show_box(f"{names.name} is trained", rows, commands)


def describe_best(story: history.Story, folder: Path) -> str:
    """Return the step with the lowest validation loss and the best file that exists."""
    lowest, best = story.lowest, story.best_file(folder)
    assert lowest is not None
    text = f"step {lowest[0]}, loss {lowest[1]:.5f}"
    if best is None:
        return f"{text}, not saved"
    if story.saved[best] == lowest[0]:
        return f"{text}: {folder / best}"
    return f"{text}, not saved; best file: {folder / best}"


def disk_needed(folder: Path, saves: tuple[int, int], written: tuple[int, int]) -> str:
    """Return the size of a run's files and the free space; says so if that is too little.

    saves: models and states. written: bytes of one of each.
    """
    needed, free = saves[0] * written[0] + saves[1] * written[1], free_bytes(folder)
    states = f" and {count_of(saves[1], 'state')}" if saves[1] else ""
    text = f"about {as_size(needed)} for {count_of(saves[0], 'save')}{states}; {as_size(free)} free"
    return text if free > SPARE * needed else f"{text}: TOO LITTLE, save less often or free some"


def watch_run(plan: TrainingPlan, step: int) -> Mapping[str, str]:
    """Return numbers for the progress bar: the peak of device memory, and the step of the next samples."""
    shown = {"mem": peak_in_words(plan.accelerator.device).replace(" GiB", "G")}
    following = next_samples(plan.options.samples, plan.steps, step, plan.progress.epoch)
    return shown if following is None else {**shown, "sample": str(following)}


def next_samples(options: SampleOptions, plan: StepPlan, step: int, epoch: int) -> int | None:
    """Return the step after which samples are due next, None for none. epoch: of the step, from 0."""
    every, epochs = options.sample_every_n_steps, options.sample_every_n_epochs
    steps = [] if every is None else [(step // every + 1) * every]
    steps += [] if epochs is None else [plan.steps_until((epoch // epochs + 1) * epochs)]
    return min((each for each in steps if each <= plan.total_steps), default=None)


def count_pauses(
    options: TrainingOptions, saving: SavingOptions, plan: StepPlan, validates: bool, step: int, epoch: int
) -> dict[str, int]:
    """Return how many pauses of each kind come after a step. epoch: whole epochs done by then."""
    samples, asked = options.samples, options.validation
    total, epochs = plan.total_steps, plan.num_epochs

    def of_steps(every: int | None) -> int:
        return 0 if not every else total // every - step // every

    def of_epochs(every: int | None, last: int) -> int:
        return 0 if not every else max(0, last // every - epoch // every)

    by_step, by_epoch = asked.validate_every_n_steps, asked.validate_every_n_epochs
    usual = None if by_step or by_epoch else max(LEAST_STEPS, plan.steps_per_epoch)
    return {
        SAMPLES: of_steps(samples.sample_every_n_steps) + of_epochs(samples.sample_every_n_epochs, epochs)
        if samples.sample_prompts is not None
        else 0,
        VALIDATION: (of_steps(by_step or usual) + of_epochs(by_epoch, epochs)) * validates,
        # one more pause: the finished model
        SAVING: of_steps(saving.save_every_n_steps) + of_epochs(saving.save_every_n_epochs, epochs - 1) + 1,
    }


def judge_alpha(
    network: NetworkOptions, sizes: tuple[Sequence[int], Sequence[float]] | None = None
) -> str | None:
    """Return alpha with its effect, and the usual value if it is low; None for networks without a rank.

    sizes: ranks and alphas of a network that goes on from a file; they replace the options.
    """
    if sizes is not None:
        ranks, alphas = sizes
        text = of_numbers("alpha", alphas).removeprefix("alpha ")
        return f"{text} for {of_numbers('rank', ranks)}, of the file" if alphas else None
    is_ranked = network.network_module is None or network.network_module.startswith(RANKED_NETWORKS)
    if not is_ranked:
        return None
    rank = network.network_dim or DEFAULT_RANK
    alpha = network.network_alpha or rank
    text = f"{alpha:g} for rank {rank}: the network acts at {alpha / rank:.3g} of its strength"
    if alpha / rank >= LOW_STRENGTH:
        return text
    return f"{text}, which is LOW: --network_alpha {max(1, rank // 2)} or {rank} is usual"


def make_reporter(
    plan: TrainingPlan, following: NextSteps, sampler: "Sampler | None", memory: MemoryWatch | None
) -> RunReporter:
    """Return the reporter of the run. With --no_page it keeps the last box."""
    progress, device, given = plan.progress, plan.accelerator.device, following.given
    is_main = plan.accelerator.is_main_process
    is_written = is_main and not plan.options.logs.no_page
    path = history.history_path(plan.names.folder, plan.names.name)
    return RunReporter(
        # other processes read nothing of it
        history.History(path, progress.session_id, progress.step if is_main else 0, is_written),
        history.Start(
            plan.family.name,
            following.total_steps,
            [(option.name, option.text) for option in given if option.is_changed],
            [(option.name, option.text) for option in given if not option.is_changed],
            True,
            history.describe_process(),
            str(real_path(plan.names.folder)),
        ),
        {} if sampler is None else dict(enumerate(sampler.prompts)),
        progress.step,
        following.commands,
        lambda: list_memory(device, memory),
        lambda: plan.accelerator.trackers if is_main else (),  # they start later
    )


def list_memory(device: torch.device, watch: MemoryWatch | None) -> Sequence[tuple[str, str]]:
    """Return the page's lines on memory: names and values."""
    host = ("most host memory of this process so far, measured", f"{gib(host_peak())} GiB")
    if device.type != "cuda":
        return [host, ("device", f"{device.type}: a prediction is made for CUDA devices (--plan)")]
    sizes: tuple[int | None, ...] = (None, None, None)
    if watch is not None:
        sizes = watch.predicted, watch.measured, watch.highest
    labels = history.PREDICTED, "a training step, measured", history.HIGHEST
    shown = ["not known" if size is None else f"{gib(size)} GiB" for size in sizes]
    return [("device", torch.cuda.get_device_name(device)), *zip(labels, shown, strict=True), host]
