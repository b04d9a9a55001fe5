"""Show the boxes of a training run, its plan and its result, and collect the facts for its page."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modules.atomic_write import free_bytes
from modules.command import quote_command
from modules.console import Row, format_count, format_duration, format_size, show_box
from modules.devices import format_gib, format_peak_memory, host_peak
from modules.installation import RUN_GOES_ON
from modules.text_files import real_path
from networks.formats.effects import NOTES
from networks.kinds.composing import RANKED_NETWORKS
from networks.metadata import describe_numbers
from networks.options import NetworkOptions
from protocols.full_model import trains_checkpoint
from runtime.planning.device_memory import MemoryWatch
from training.checks import describe_learning_rate
from training.data.table_times import describe_times
from training.features.contract import SKIPPED_STEPS
from training.learner import NetworkSpec
from training.metadata import continued_sizes_metadata
from training.next_commands import NextSteps
from training.options import TrainingOptions
from training.plan import TrainingPlan
from training.reports import history
from training.reports.pauses import SAMPLES, SAVING, VALIDATION
from training.reports.reporter import RunReporter, find_usable_file, name_best_file
from training.reports.sections import SAMPLES as SAMPLE_FOLDER
from training.reports.sections import page_path
from training.run_options import MIN_STEPS, SampleOptions
from training.saving.options import SavingOptions
from training.steps import StepPlan
from training.trainable import Trainable
from training.training_run import TrainingRun

MOMENTS_BYTES = 8  # of AdamW's two moments, for each trained weight; other optimizers keep less
FLOAT_BYTES = 4  # states are saved in float32
LOW_STRENGTH = 0.1  # a lower alpha / rank gets a note
SHOWN_NOTES = 3  # the last notes of features that the box at the end repeats; the page has all of them
SHOWN_NAMES = 6  # maximum number of parts that are named per learning rate
SPARE = 1.05  # the box warns if the disk has less free space than this times the size of the run's files


def count_saves(
    options: SavingOptions, plan: StepPlan, first_step: int, first_epoch: int = 0
) -> tuple[int, int]:
    """Return the numbers of models and states that a run leaves on disk, not counting saves by time.

    Args:
        options: Options of the run.
        plan: The plan of the run.
        first_step: Step after which saves are counted.
        first_epoch: First epoch that is not finished at that step.
    """
    num_models = 0
    if options.save_every_n_steps is not None:
        every = options.save_every_n_steps
        num_saves = plan.total_steps // every - first_step // every
        if options.save_last_n_steps is not None:  # counts steps, not saves
            # the save from exactly that many steps ago is kept too
            num_saves = min(num_saves, options.save_last_n_steps // every + 1)
        num_models += num_saves
    if options.save_every_n_epochs is not None:
        every = options.save_every_n_epochs
        # the last epoch is saved as the final model
        num_saves = (plan.num_epochs - 1) // every - first_epoch // every
        if options.save_last_n_epochs is not None:  # counts saves
            num_saves = min(num_saves, options.save_last_n_epochs)
        num_models += max(0, num_saves)
    num_states = num_models if options.save_state else 0
    num_final_models = 1
    return num_models + num_final_models, num_states + options.saves_state_at_end


def saved_bytes(
    parameters: Sequence[Tensor], dtype: torch.dtype | None, has_average: bool = False
) -> tuple[int, int]:
    """Return the sizes in bytes of one saved model, including its average, and of one saved state.

    Args:
        parameters: The trained parameters.
        dtype: Dtype of saved models; None leaves it unchanged.
        has_average: Whether an average is saved too.
    """
    model = sum(parameter.numel() * (dtype or parameter.dtype).itemsize for parameter in parameters)
    count = sum(parameter.numel() for parameter in parameters)
    average = FLOAT_BYTES if has_average else 0
    return model * (1 + has_average), count * (FLOAT_BYTES + MOMENTS_BYTES + average)


def show_start(run: TrainingRun, dtype: torch.dtype | None) -> None:
    """Show a box with the plan of the run: model, data, steps, options and memory.

    Args:
        run: The run.
        dtype: Dtype of saved models; None leaves it unchanged.
    """
    split = run.model.trainable.sharded_weights  # this process's rows of a weight -> the whole weight
    parameters = [split.get(parameter, parameter) for parameter in run.parameters]
    rows = [*_make_learning_rows(run, parameters), *_make_writing_rows(run, parameters, dtype)]
    show_box(f"Training {run.plan.names.name}", rows)


def _make_learning_rows(run: TrainingRun, parameters: Sequence[Tensor]) -> list[Row]:
    """Return the rows of the start box about the model, its trained parts, the data and the optimizer."""
    plan, options, steps = run.plan, run.options, run.steps
    model_keys = ("architecture", "task", "sd_model_name")
    metadata = plan.family.metadata.items()
    model = [text for key, text in metadata if text and key.startswith(model_keys)]
    num_weights = sum(parameter.numel() for parameter in parameters)
    # the items, the timesteps at which they are trained, and the targets
    data = [f"{format_count(plan.order.num_items, 'item')} with repeats"]
    if plan.validation:
        num_held_back = format_count(len(plan.validation), "item")
        data.append(f"{num_held_back} for validation")
    data.append(format_count(plan.steps.num_batches, "batch"))
    rows: dict[str, str | None] = {"data": ", ".join(data)}
    if plan.table_times:
        times = describe_times(options.timesteps, plan.config.datasets)
        rows["timesteps"] = "\n".join(times)
    if plan.features.targets or plan.features.info.targets:
        rows["targets"] = "\n".join(plan.features.describe_targets())
    # the number of steps and epochs, and the step at which a resumed run begins
    length = f"{steps.total_steps}, of the {steps.steps_per_epoch} of an epoch"
    if steps.total_steps >= steps.steps_per_epoch:
        length = (
            f"{steps.total_steps} in {format_count(steps.num_epochs, 'epoch')} of {steps.steps_per_epoch}"
        )
    first_step = f", from step {run.progress.step + 1} on" if run.progress.step else ""
    rows["steps"] = f"{length}{first_step}"
    rows["learning rate"] = _describe_rates(options, run.model.trainable, plan.network_spec)
    optimizer = options.optimizer.optimizer_type or "AdamW"
    rows["optimizer"] = f"{optimizer}, seed {plan.progress.seed}"
    return [("model", ", ".join(model)), *_make_network_rows(run, num_weights), *rows.items()]


def _describe_rates(options: TrainingOptions, trainable: Trainable, network_spec: NetworkSpec) -> str:
    """Return the learning rates for the box: --learning_rate, and a line for each rate if parts differ."""
    default = options.optimizer.learning_rate
    names_by_rate: dict[float, list[str]] = {}
    for name, group in zip(trainable.group_names, trainable.groups, strict=False):
        names_by_rate.setdefault(group.get("lr", default), []).append(name)
    described_default = describe_learning_rate(options, network_spec)
    # in full fine-tuning all parts may have rates other than --learning_rate
    is_replaced = options.network is None and bool(names_by_rate) and default not in names_by_rate
    # at 0, only a part without a rate of its own uses --learning_rate
    is_unused = is_replaced or (default == 0 and default not in names_by_rate)
    if len(names_by_rate) < 2 and not is_unused:
        return described_default
    lines = "\n".join(f"{rate:g}: {_shorten_list(names)}" for rate, names in names_by_rate.items())
    if is_replaced or default == 0:
        return lines
    return f"{described_default}\n{lines}"


def _shorten_list(names: Sequence[str]) -> str:
    """Join names with commas; if there are many, only the first and last ones."""
    shown = [*names] if len(names) <= SHOWN_NAMES else [*names[: SHOWN_NAMES - 2], "...", names[-1]]
    return ", ".join(shown)


def _make_writing_rows(
    run: TrainingRun, parameters: Sequence[Tensor], dtype: torch.dtype | None
) -> list[Row]:
    """Return the rows of the start box about saves, samples, disk space and folders."""
    plan = run.plan
    options = run.options
    samples = options.samples
    saving = plan.saving
    saving_times = _times(
        {
            "steps": saving.save_every_n_steps,
            "epochs": saving.save_every_n_epochs,
            "minutes": saving.save_every_n_minutes,
        }
    )
    sampling_text = None
    if samples.sample_prompts is not None:
        sampling_text = f"{_sampling_times(samples)}, from {samples.sample_prompts}"
    counts = count_saves(saving, plan.steps, plan.progress.step, plan.progress.epoch)
    has_average = plan.features.average is not None
    model_bytes, state_bytes = saved_bytes(parameters, dtype, has_average)
    family = plan.family
    # frozen weights are saved too, and an average is a second file
    if options.network is None and trains_checkpoint(family):
        model_bytes = family.checkpoint_bytes(dtype) * (1 + has_average)
    page = page_path(plan.names.folder, plan.names.name)
    return [
        ("saves", " and ".join([*saving_times, "at the end"])),
        ("samples", sampling_text),
        ("disk", disk_needed(plan.names.folder, counts, (model_bytes, state_bytes))),
        ("folder", str(plan.names.folder)),
        ("page", None if options.logs.no_page else str(page)),
        *plan.features.info.at_start.items(),
    ]


def _make_network_rows(run: TrainingRun, num_weights: int) -> list[Row]:
    """Return the rows about what is trained: the network with its rank, or the trained parts of the model."""
    plan, trainable = run.plan, run.model.trainable
    spec, full_dit = plan.network_spec, plan.options.full_dit
    lora = spec.lora_options
    # ranks and alphas of a network that continues from a file; None if the options set them
    ranks_and_alphas: tuple[list[int], list[float]] | None = None
    if plan.options.network is not None and any(
        continued_sizes_metadata(run.model, part) for part in trainable.written_files
    ):
        ranks_and_alphas = trainable.ranks_and_alphas()
    trained = "" if spec.custom is None else spec.custom.description
    if not trained and lora is None:
        parts = full_dit.name_parts if full_dit is not None else ()
        trained = f"of the model: {' '.join(parts)}" if parts else "the whole model"
    elif not trained and lora is not None:
        rank_name = lora.kind.size.word
        trained = f"{plan.network_module}, {rank_name} {lora.rank}"
        if ranks_and_alphas is not None:
            ranks, _ = ranks_and_alphas
            trained = f"{plan.network_module}, {describe_numbers(rank_name, ranks)} of the file"
    return [
        ("learns", f"{trained}, {format_count(num_weights, 'weight')}"),
        ("alpha", None if lora is None else judge_alpha(lora, ranks_and_alphas)),
    ]


def _sampling_times(samples: SampleOptions) -> str:
    times = ["before the first step"] if samples.sample_at_first else []
    times += _times({"steps": samples.sample_every_n_steps, "epochs": samples.sample_every_n_epochs})
    return " and ".join(times or ["when asked for"])


def _times(every: Mapping[str, float | None]) -> list[str]:
    """Describe intervals in words, such as "every 5 epochs"."""
    return [
        f"every {unit.removesuffix('s')}" if number == 1 else f"every {number:.12g} {unit}"
        for unit, number in every.items()
        if number is not None
    ]


def show_end(run: TrainingRun, run_history: history.RunHistory, following: NextSteps) -> None:
    """Print a box with the results of a finished run, and the commands that can follow.

    Args:
        run: The finished run.
        run_history: Content of its history.
        following: Suggests the commands.
    """
    names = run.plan.names
    file = find_usable_file(run_history, names.folder, names.name)
    *commands, _ = following.commands(file, is_finished=True)  # the last command starts this run again
    is_windows = sys.platform == "win32"
    command_rows: list[Row] = [
        (command.heading, command.powershell if is_windows else command.bash) for command in commands
    ]
    command_rows += [
        (heading, quote_command(arguments)) for heading, arguments in run.features.info.commands.items()
    ]
    show_box(f"{names.name} is trained", _make_result_rows(run, run_history), command_rows)


def _make_result_rows(run: TrainingRun, run_history: history.RunHistory) -> list[Row]:
    """Return the rows of the end box: files, steps, loss, samples, page and memory."""
    names, losses, clock = run.plan.names, run.progress.losses, run.logs.clock
    results: list[Row] = []
    for path in filter(Path.exists, names.model_files(names.name).values()):
        # the size in bytes of a file, or of all files in a folder
        files = path.rglob("*") if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files if file.is_file())
        results.append(("result", f"{path} ({format_size(size)})"))
    if run_history.validations:
        results.append(("best by validation", describe_best(run_history, names.folder, names.name)))
    duration = format_duration(clock.total_step_seconds)
    if clock.seconds_per_step is not None:
        duration += f" ({clock.seconds_per_step:.3g} s a step)"
    results.append(("steps", f"{clock.steps} in {duration}, without pauses"))
    if SKIPPED_STEPS in run.features.info.in_files:  # a feature that can skip steps
        results.append(("skipped steps", str(run.progress.skipped)))
    results += [(f"step {step}", text) for step, text in run_history.notes[-SHOWN_NOTES:]]
    if losses:
        mean = sum(losses) / len(losses)
        results.append(("average loss", f"{mean:.4g}"))
    samples = names.folder / SAMPLE_FOLDER
    if run.sampler is not None and samples.is_dir():
        results.append(("samples", str(samples)))
    if not run.options.logs.no_page:
        results.append(("page", str(page_path(names.folder, names.name))))
    peak = format_peak_memory(run.device)
    if run.memory is not None:
        peak = f"{format_gib(run.memory.highest)} GiB"
    results.append(("peak memory", peak))
    if run.options.network is not None:
        for note in [NOTES[kind] for kind in run.options.network.kinds if kind in NOTES][:1]:
            results.append(("other tools", note))
    if os.environ.get(RUN_GOES_ON):  # `reelsmith run` started this in a folder that the user did not type
        results.append(("commands", f"typed in {Path.cwd()}"))
    return results


def describe_best(run_history: history.RunHistory, folder: Path, name: str) -> str:
    """Describe the step of the lowest validation loss, and the best file that exists."""
    assert run_history.lowest_validation is not None
    lowest_step, lowest_loss = run_history.lowest_validation
    best = name_best_file(folder, name, run_history)
    text = f"step {lowest_step}, loss {lowest_loss:.5f}"
    if best is None:
        return f"{text}, not saved"
    if run_history.saved[best] == lowest_step:
        return f"{text}: {folder / best}"
    # scores of samples may prefer a file of another step, even if the one of this step is saved
    is_saved = any(
        step == lowest_step and (folder / file).exists() for file, step in run_history.saved.items()
    )
    return f"{text}{'' if is_saved else ', not saved'}; best file: {folder / best}"


def disk_needed(folder: Path, saves: tuple[int, int], written: tuple[int, int]) -> str:
    """Describe the size of a run's files and the free space, with a warning if that is too little.

    Args:
        folder: Folder of the files.
        saves: Numbers of models and states.
        written: Bytes of one model and of one state.
    """
    num_models, num_states = saves
    model_bytes, state_bytes = written
    needed = num_models * model_bytes + num_states * state_bytes
    free = free_bytes(folder)
    states = f" and {format_count(num_states, 'state')}" if num_states else ""
    model_saves = format_count(num_models, "save")
    text = f"about {format_size(needed)} for {model_saves}{states}; {format_size(free)} free"
    return text if free > SPARE * needed else f"{text}: TOO LITTLE, save less often or free some"


def watch_run(plan: TrainingPlan, step: int) -> Mapping[str, str]:
    """Return values for the progress bar: peak device memory, and the step of the next samples."""
    shown = {"mem": format_peak_memory(plan.accelerator.device).replace(" GiB", "G")}
    following = next_samples(plan.options.samples, plan.steps, step, plan.progress.epoch)
    return shown if following is None else {**shown, "sample": str(following)}


def next_samples(options: SampleOptions, plan: StepPlan, step: int, epoch: int) -> int | None:
    """Return the step after which samples are due next; None if none are due before the end.

    Args:
        options: Options of samples.
        plan: Numbers of steps and epochs of the run.
        step: Number of the optimizer step.
        epoch: Epoch of the step, from 0.
    """
    every_steps, every_epochs = options.sample_every_n_steps, options.sample_every_n_epochs
    due_steps = []
    if every_steps is not None:
        due_steps.append((step // every_steps + 1) * every_steps)
    if every_epochs is not None:
        next_epoch = (epoch // every_epochs + 1) * every_epochs
        due_steps.append(plan.steps_until(next_epoch))
    return min((due_step for due_step in due_steps if due_step <= plan.total_steps), default=None)


def count_pauses(
    options: TrainingOptions, saving: SavingOptions, plan: StepPlan, *, validates: bool, step: int, epoch: int
) -> dict[str, int]:
    """Return the number of pauses for samples, validation and saving that remain after a step.

    Args:
        options: Options of the run.
        saving: Options of saving.
        plan: The plan of the run.
        validates: Whether the run has a validation.
        step: Number of the optimizer step.
        epoch: Number of whole epochs done by then.
    """
    samples, validation = options.samples, options.validation
    total_steps, num_epochs = plan.total_steps, plan.num_epochs

    def count_by_step(every: int | None) -> int:
        return 0 if not every else total_steps // every - step // every

    def count_by_epoch(every: int | None, last_epoch: int) -> int:
        return 0 if not every else max(0, last_epoch // every - epoch // every)

    num_samples = 0
    if samples.sample_prompts is not None:
        num_samples = count_by_step(samples.sample_every_n_steps)
        num_samples += count_by_epoch(samples.sample_every_n_epochs, num_epochs)
    num_validations = 0
    if validates:
        every_steps, every_epochs = validation.validate_every_n_steps, validation.validate_every_n_epochs
        if not every_steps and not every_epochs:  # after each epoch, but not within MIN_STEPS steps
            every_steps = max(MIN_STEPS, plan.steps_per_epoch)
        num_validations = count_by_step(every_steps) + count_by_epoch(every_epochs, num_epochs)
    # the last epoch is saved as the finished model, which is one more pause
    num_saves = count_by_step(saving.save_every_n_steps) + 1
    num_saves += count_by_epoch(saving.save_every_n_epochs, num_epochs - 1)
    return {SAMPLES: num_samples, VALIDATION: num_validations, SAVING: num_saves}


def judge_alpha(
    network: NetworkOptions, ranks_and_alphas: tuple[Sequence[int], Sequence[float]] | None = None
) -> str | None:
    """Return alpha with its effect, and the usual value if it is low; None for networks without a rank.

    Args:
        network: The network.
        ranks_and_alphas: Ranks and alphas of a network continued from a file, which replace the options.
    """
    if ranks_and_alphas is not None:
        ranks, alphas = ranks_and_alphas
        text = describe_numbers("alpha", alphas).removeprefix("alpha ")
        return f"{text} for {describe_numbers('rank', ranks)}, of the file" if alphas else None
    is_ranked = network.network_module is None or network.network_module.startswith(RANKED_NETWORKS)
    if not is_ranked:
        return None
    rank = network.rank
    alpha = network.network_alpha or rank
    text = f"{alpha:g} for rank {rank}: the network acts at {alpha / rank:.3g} of its strength"
    if alpha / rank >= LOW_STRENGTH:
        return text
    return f"{text}, which is LOW: --network_alpha {max(1, rank // 2)} or {rank} is usual"


def make_reporter(plan: TrainingPlan, following: NextSteps, memory: MemoryWatch | None) -> RunReporter:
    """Return the reporter, which writes the history of the run for its page (not with --no_page)."""
    progress, names, device = plan.progress, plan.names, plan.accelerator.device
    is_main = plan.accelerator.is_main_process
    run_history = history.History(
        history.history_path(names.folder, names.name),
        progress.session_id,
        progress.step if is_main else 0,
        is_written=is_main and not plan.options.logs.no_page,
    )
    script_options = following.command.script_options
    start = history.Start(
        model=plan.family.name,
        total_steps=plan.steps.total_steps,
        changed=[(option.name, option.text) for option in script_options if option.is_changed],
        unchanged=[(option.name, option.text) for option in script_options if not option.is_changed],
        listens=True,
        process=history.describe_process(),
        written_in=str(real_path(names.folder)),
        working_folder=str(Path.cwd()),
        charts=[chart for tally in plan.features.tallies for chart in tally.charts],
        tiles=[tile for tally in plan.features.tallies for tile in tally.tiles],
    )
    return RunReporter(
        history=run_history,
        start=start,
        step=progress.step,
        commands=following.commands,
        memory=lambda: list_memory(device, memory),
    )


def list_memory(device: torch.device, watch: MemoryWatch | None) -> Sequence[tuple[str, str]]:
    """Return the names and values of the page's lines about memory use."""
    host = ("most host memory of this process so far, measured", f"{format_gib(host_peak())} GiB")
    if device.type != "cuda":
        return [host, ("device", f"{device.type}: a prediction is made for CUDA devices (--plan)")]
    sizes: tuple[int | None, ...] = (None, None, None)
    if watch is not None:
        sizes = watch.predicted, watch.measured, watch.highest
    labels = history.PREDICTED, "a training step, measured", history.HIGHEST
    shown = ["not known" if size is None else f"{format_gib(size)} GiB" for size in sizes]
    return [("device", torch.cuda.get_device_name(device)), *zip(labels, shown, strict=True), host]
