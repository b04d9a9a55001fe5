"""The boxes of a training run: its plan, and its result."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modules.atomic_write import free_bytes
from modules.command import as_typed
from modules.console import Row, as_size, count_of, in_words, show_box
from modules.planning.device_memory import MemoryWatch, peak_in_words
from modules.planning.memory_plan import gib
from networks.lora_settings import DEFAULT_RANK
from networks.options import NetworkOptions
from training.following import DORA_ELSEWHERE, NextSteps
from training.learning_options import FIND_RATE
from training.options import RANKED_NETWORKS, TrainingOptions
from training.plan import TrainingPlan
from training.reports.history import Story
from training.reports.page import page_path
from training.reports.sample_files import FOLDER as SAMPLES
from training.run_options import LogOptions, SampleOptions
from training.saving.files import Names
from training.saving.options import SavingOptions
from training.steps import StepPlan
from training.training_run import TrainingRun

MOMENTS_BYTES = 8  # of AdamW's two moments, for each trained weight; other optimizers keep less
FLOAT_BYTES = 4  # states are saved in float32
LOW_STRENGTH = 0.1  # alpha / rank below it is told
# of a network, of a whole model: rates of Adam below and above which it is told, and what is usual
USUAL_RATES = (2e-5, "1e-4", 5e-3), (5e-8, "1e-5", 1e-4)
SPARE = 1.05  # a disk with less room than this times what the run will write is warned of


def count_saves(
    options: SavingOptions, plan: StepPlan, first_step: int, first_epoch: int = 0
) -> tuple[int, int]:
    """Return how many models and states are on disk when a run is over. Saves by the clock are left out.

    first_step: after which they count. first_epoch: the first one that is not finished then.
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
    is_last = options.save_state or options.save_state_on_train_end
    return models + 1, (models if options.save_state else 0) + is_last


def saved_bytes(
    parameters: Sequence[Tensor], dtype: torch.dtype | None, has_average: bool = False
) -> tuple[int, int]:
    """Return the bytes of one model, with its average (EMA), and of one state.

    parameters: that are trained. dtype: of saved models; None: as they are.
    """
    model = sum(one.numel() * (dtype or one.dtype).itemsize for one in parameters)
    count, average = sum(one.numel() for one in parameters), FLOAT_BYTES if has_average else 0
    return model * (1 + has_average), count * (FLOAT_BYTES + MOMENTS_BYTES + average)


def show_start(run: TrainingRun, dtype: torch.dtype | None) -> None:
    """Show the plan of the run. dtype: of saved models; None: as they are."""
    plan, options, steps, parameters = run.plan, run.options, run.steps, run.parameters
    written = saved_bytes(parameters, dtype, options.average.ema_decay is not None)
    saves = count_saves(options.saving, steps, plan.progress.step, plan.progress.epoch)
    learns = count_of(sum(one.numel() for one in parameters), "weight")
    held_back = f", {count_of(len(plan.validation), 'item')} for validation" if plan.validation else ""
    begun = f", from step {plan.progress.step + 1} on" if plan.progress.step else ""
    rows: list[Row] = [
        ("model", _model(plan.family.metadata)),
        ("learns", f"{_learner(plan)}, {learns}"),
        ("alpha", None if options.network is None else judge_alpha(options.network)),
        ("data", f"{plan.order.num_items} items with repeats{held_back}, {steps.num_batches} batches"),
        ("steps", f"{_steps(steps)}{begun}"),
        ("learning rate", judge_rate(options)),
        ("optimizer", f"{options.optimizer.optimizer_type or 'AdamW'}, seed {plan.progress.seed}"),
        ("saves", _saves(options.saving)),
        ("samples", _samples(plan)),
        ("disk", disk_needed(plan.output_dir, saves, written)),
        ("folder", str(plan.output_dir)),
        ("page", _page(options.logs, plan.names)),
    ]
    show_box(f"Training {plan.output_name}", rows)


def show_end(run: TrainingRun, story: Story, following: NextSteps) -> None:
    """Show the result of a run that took its last step, and the commands that can follow."""
    names = run.plan.names
    results, pace = names.files(names.name).values(), run.logs.pace
    seconds = pace.seconds_per_step
    speed = "" if seconds is None else f" ({seconds:.3g} s a step)"
    losses = run.progress.losses
    samples = names.folder / SAMPLES
    rows: list[Row] = [
        *(
            ("result", f"{path} ({as_size(path.stat().st_size)})" if path.exists() else None)
            for path in results
        ),
        ("best by validation", describe_best(story, names.folder)),
        ("steps", f"{pace.steps} in {in_words(pace.active)}{speed}, without pauses"),
        ("average loss", f"{sum(losses) / len(losses):.4g}" if losses else None),
        ("samples", str(samples) if run.sampler.prompts and samples.is_dir() else None),
        ("page", _page(run.options.logs, names)),
        (
            "peak memory",
            f"{gib(run.memory.highest)} GiB"
            if isinstance(run.memory, MemoryWatch)
            else peak_in_words(run.device),
        ),
        ("other tools", DORA_ELSEWHERE if following.is_dora else None),
    ]
    best = story.best_file(names.folder)
    commands: list[Row] = [
        (command.title, command.powershell if sys.platform == "win32" else command.bash)
        for command in following.commands(None if best is None else names.folder / best, is_finished=True)
    ]
    if run.options.logs.logging_dir is not None:
        board = as_typed(["tensorboard", "--logdir", str(run.options.logs.logging_dir)])
        commands.append(("Look at the curves", board))
    show_box(f"{names.name} is trained", rows, commands)


def describe_best(story: Story, folder: Path) -> str | None:
    """Return the step with the lowest validation loss and the best file that is there."""
    lowest, best = story.lowest, story.best_file(folder)
    if lowest is None:
        return None
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
    text = f"about {as_size(needed)} for {count_of(saves[0], 'model')}{states}; {as_size(free)} free"
    return text if free > SPARE * needed else f"{text}: TOO LITTLE, save less often or free some"


def watch_run(plan: TrainingPlan) -> Callable[[int], Mapping[str, str]]:
    """Return the bar's numbers beside losses at a step: the peak of memory, the step of the next samples."""
    options, device = plan.options.samples, plan.accelerator.device

    def watch(step: int) -> Mapping[str, str]:
        shown = {"mem": peak_in_words(device).replace(" GiB", "G")}
        following = next_samples(options, plan.steps, step, plan.progress.epoch)
        return shown if following is None else {**shown, "sample": str(following)}

    return watch


def next_samples(options: SampleOptions, plan: StepPlan, step: int, epoch: int) -> int | None:
    """Return the step after which samples are due next, None for none. epoch: of the step, from 0."""
    every, epochs = options.sample_every_n_steps, options.sample_every_n_epochs
    steps = [] if every is None else [(step // every + 1) * every]
    steps += [] if epochs is None else [plan.steps_until((epoch // epochs + 1) * epochs)]
    return min((each for each in steps if each <= plan.total_steps), default=None)


def judge_alpha(network: NetworkOptions) -> str | None:
    """Return alpha with its effect, and the usual value if it is low; None if a rank says nothing."""
    is_ranked = network.network_module is None or network.network_module.startswith(RANKED_NETWORKS)
    if not is_ranked or network.dim_from_weights:
        return None
    rank = network.network_dim or DEFAULT_RANK
    alpha = network.network_alpha or rank
    text = f"{alpha:g} for rank {rank}: the network acts at {alpha / rank:.3g} of its strength"
    if alpha / rank >= LOW_STRENGTH:
        return text
    return f"{text}, which is LOW: --network_alpha {max(1, rank // 2)} or {rank} is usual"


def judge_rate(options: TrainingOptions) -> str:
    """Return the learning rate, and the usual one if it is far from that."""
    given, parts, is_whole = options.optimizer, options.parts, options.network is None
    rate = given.learning_rate if parts is None or parts.unet_lr is None else parts.unet_lr
    text, name = f"{rate:g}", (given.optimizer_type or "AdamW").rpartition(".")[2].lower()
    low, usual, high = USUAL_RATES[is_whole]
    if "adam" not in name or name.startswith(FIND_RATE) or low <= rate <= high:
        return text
    what = "a whole model" if is_whole else "a LoRA"
    return f"{text}, which is {'LOW' if rate < low else 'HIGH'} for {what}: {usual} is usual"


def _steps(plan: StepPlan) -> str:
    if plan.total_steps < plan.steps_per_epoch:
        return f"{plan.total_steps}, of the {plan.steps_per_epoch} of an epoch"
    return f"{plan.total_steps} in {count_of(plan.num_epochs, 'epoch')} of {plan.steps_per_epoch}"


def _page(options: LogOptions, names: Names) -> str | None:
    return None if options.no_page else str(page_path(names.folder, names.name))


def _learner(plan: TrainingPlan) -> str:
    whole, network = plan.options.whole_dit, plan.options.network
    if network is not None:
        rank = f"rank {network.network_dim or DEFAULT_RANK}"
        return f"{plan.network_module}, {'ranks of the file' if network.dim_from_weights else rank}"
    assert whole is not None  # one of the two is there
    return f"of the model: {' '.join(whole.name_parts)}" if whole.name_parts else "the whole model"


def _model(metadata: Mapping[str, str]) -> str:
    known = ("architecture", "task", "sd_model_name")
    return ", ".join(value for name, value in metadata.items() if value and name.startswith(known))


def _saves(options: SavingOptions) -> str:
    times = {
        "steps": options.save_every_n_steps,
        "epochs": options.save_every_n_epochs,
        "minutes": options.save_every_n_minutes,
    }
    found = [f"every {number:g} {unit}" for unit, number in times.items() if number is not None]
    return " and ".join([*found, "at the end"])


def _samples(plan: TrainingPlan) -> str | None:
    options = plan.options.samples
    if options.sample_prompts is None or not options.is_timed:
        return None
    times = {"steps": options.sample_every_n_steps, "epochs": options.sample_every_n_epochs}
    found = [f"every {number} {unit}" for unit, number in times.items() if number is not None]
    first = ["before the first step"] if options.sample_at_first else []
    return f"{' and '.join([*first, *found])}, from {options.sample_prompts}"
