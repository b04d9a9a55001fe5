"""Estimate how long a training run takes, from the steps that earlier runs on this machine have measured."""

import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from browser.folders.described_folder import DATASET_FILE, DescribedFolder
from browser.runs.runs import FINISHED, Runs, RunSummary, is_process_alive, read_run_summary
from modules.errors import UserError
from modules.pages.language import TranslatableText, say, say_count
from modules.paths import expand_path
from modules.text_files import parse_toml, read_text
from training.reports.history import history_path

DEVICE = "device"  # entry of a history with the name of the card
MAX_BYTES = 1 << 20  # maximum size of a dataset.toml
SIZES = ("resolution", "target_frames", "batch_size")  # dataset keys that determine the duration of a step
TASK = "task"  # training option that determines the duration of a step
ACCUMULATION = "gradient_accumulation_steps"


def describe_duration(
    runs: Runs, described: DescribedFolder, steps: int | None, cards: Collection[str] = ()
) -> str:
    """Describe how long `steps` of a folder's training run take; "" if no run here has measured it.

    The folder's own run takes precedence, then the latest finished run of the same model with images and
    batches of the same size. Runs from another machine are ignored. `cards` are the names of this machine's
    GPUs.
    """
    if steps is None:
        return ""
    own_run = _read_own_run(runs, described)
    if (
        own_run is not None
        and own_run.step_seconds is not None
        and (own_run.start is None or _is_from_this_machine(own_run, cards))
    ):
        time = _describe_time(steps, own_run.step_seconds)
        return say("%(time)s, as measured in the run %(name)s.", time=time, name=described.name)
    run = _find_comparable_run(runs, described, cards)
    if run is None or run.step_seconds is None:
        return ""
    return say(
        "%(time)s, as measured in the run %(name)s with the same model and size.",
        time=_describe_time(steps, run.step_seconds, is_approximate=True),
        name=run.name,
    )


def _describe_time(steps: int, seconds: float, is_approximate: bool = False) -> TranslatableText:
    """Describe how long `steps` take at `seconds` per step, in seconds, minutes or hours."""
    hours = steps * seconds / 3600
    if hours >= 1:
        duration = say("%(hours)s hours", hours=f"{hours:.1f}")
    elif round(hours * 60) <= 1:
        duration = say_count(max(1, round(steps * seconds)), "%(n)s second", "%(n)s seconds")
    else:
        duration = say_count(max(1, round(hours * 60)), "%(n)s minute", "%(n)s minutes")
    if is_approximate:
        duration = say("about %(time)s", time=duration)
    return say_count(
        steps,
        "%(steps)s step takes %(time)s: %(seconds)s seconds each",
        "%(steps)s steps take %(time)s: %(seconds)s seconds each",
        steps=steps,
        time=duration,
        seconds=f"{seconds:.2g}",
    )


def _read_own_run(runs: Runs, described: DescribedFolder) -> RunSummary | None:
    """Return the training run of a folder with a run.toml; None if it has not begun."""
    path = history_path(described.output, described.name)
    if not runs.is_below(path):
        return None
    try:
        return read_run_summary(path, path.stat())
    except OSError:
        return None


def _is_from_this_machine(run: RunSummary, cards: Collection[str]) -> bool:
    """Return whether a run started on this machine since its last boot, or used a card with the same name."""
    is_from_this_boot = run.start is not None and is_process_alive(run.start.process) is not None
    return is_from_this_boot or run.memory.get(DEVICE, "") in cards


def _find_comparable_run(runs: Runs, described: DescribedFolder, cards: Collection[str]) -> RunSummary | None:
    """Return the latest finished run with the same transformer, dataset sizes and work per step, or None."""
    file_name = Path(str(described.values.get("dit", ""))).name
    sizes = _read_sizes(described.folder / DATASET_FILE)
    if not file_name or sizes is None:
        return None
    for run in runs.list_all():  # the newest first
        is_measured = run.state == FINISHED and run.step_seconds is not None
        has_same_model = run.network == file_name
        if not (is_measured and has_same_model and _is_from_this_machine(run, cards)):
            continue
        run_options = {} if run.start is None else dict((*run.start.unchanged, *run.start.changed))
        has_equal_work = _has_equal_work_per_step(described.values, run_options)
        if has_equal_work and _find_run_sizes(runs, run, run_options) == sizes:
            return run
    return None


def _has_equal_work_per_step(values: Mapping[str, Any], run_options: Mapping[str, str]) -> bool:
    """Return whether a run.toml and an earlier run have equal tasks and gradient accumulation steps."""
    # The task counts as equal if only one of them names it.
    task, run_task = values.get(TASK), run_options.get(TASK)
    is_same_task = task is None or run_task is None or str(task) == run_task
    return is_same_task and str(values.get(ACCUMULATION, 1)) == run_options.get(ACCUMULATION, "1")


def _find_run_sizes(runs: Runs, run: RunSummary, typed: Mapping[str, str]) -> set[str] | None:
    folder, text = run.working_folder, typed.get("dataset_config")
    with contextlib.suppress(ValueError):
        path = expand_path(text, folder) if folder is not None and text else None
        if path is not None and runs.is_below(path):
            return _read_sizes(path)
    return None


def _read_sizes(path: Path) -> set[str] | None:
    """Return the resolutions that the datasets in a dataset.toml set; None if it cannot be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, UserError):
        config = parse_toml(read_text(path, MAX_BYTES))
        shared = config.get("general", {})
        tables = [{**shared, **table} for table in config["datasets"]] if "datasets" in config else [shared]
        return {str([table.get(key) for key in SIZES]) for table in tables}
    return None
