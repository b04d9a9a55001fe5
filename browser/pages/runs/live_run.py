"""The page of a run, as long as a server updates it."""

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from browser.core.short_names import short_digest
from browser.core.templates import show_page
from browser.jobs.command_lines import format_cd
from browser.jobs.printed_lines import translate_command, translate_memory
from browser.runs.run_views import PLAYED, LiveRunState, label_runs, linked_clip
from browser.runs.runs import (
    RUNNING,
    Runs,
    RunSummary,
)
from modules.errors import UserError
from modules.media.reading import image_size, video_info
from training.reports.history import (
    Points,
    RunHistory,
)
from training.reports.page import (
    TEMPLATE,
    list_charts,
    list_tiles,
    page_values,
)
from training.reports.present_files import current_commands
from training.reports.scores import list_score_charts
from training.reports.sections import SAMPLES, scores_path

MAX_SAMPLES = (2000, 100)  # columns and rows of the grid
MAX_POINTS = 1500  # maximum number of points of a curve; zooming shows more
MAX_MESSAGES = 500


def run_page(
    runs: Runs,
    run: RunSummary,
    can_write: bool,
    is_paused: bool = False,
    actions: str = "",
    lower_buttons: str = "",
    kill_message: str = "",
) -> str:
    """Return the HTML of a run's page.

    Args:
        is_paused: Whether the queue is paused, so that no job starts.
        actions: HTML of the buttons above the samples.
        lower_buttons: HTML of the buttons below the samples.
        kill_message: State to show for a run that the page has killed; "" for all other runs.

    Raises:
        OSError: If the history cannot be read.
    """
    run_history = runs.open(run).run_history
    live_state = LiveRunState.of(run, run_history, kill_message)
    start = live_state.displayed.start
    values = page_values(
        run.history.parent,
        run_history,
        live_state.displayed,
        load=linked_clip,
        maximum=MAX_SAMPLES,
        name=run.name,
    )
    commands = current_commands(run_history, run.history.parent, run.name)
    values["commands"] = [translate_command(command) for command in commands]
    values["memory"] = translate_memory(run_history.memory)
    values["live"] = {
        **_describe_live_run(runs, run, run_history, live_state),
        # whether the training run watches for request files, such as NAME.stop
        "can_ask": can_write and start.listens and live_state.state == RUNNING,
        "can_sample": bool(dict(start.changed).get("sample_prompts")),  # samples need a prompt file
        "can_queue": can_write,
        "is_paused": is_paused,
        "actions": Markup(actions),
        "further": Markup(lower_buttons),
    }
    return show_page(TEMPLATE.name, run.name, values)


def _describe_live_run(
    runs: Runs, run: RunSummary, run_history: RunHistory, live_state: LiveRunState
) -> dict[str, Any]:
    """Return the template values that only the server knows, for the page of a run."""
    sample_names = [name for row in run_history.samples.values() for name in row.files.values()]
    labeled = label_runs(runs.list_all())
    other_runs = [(candidate.id, label) for candidate, label in labeled if candidate.id != run.id]
    return {
        "id": run.id,
        "mark": mark_page(run_history, live_state),
        "left": live_state.time_left,
        "name": run.name,
        "shape": read_shape(runs, run.history.parent, sample_names),
        "plays": any(name.endswith(PLAYED) for name in sample_names),
        "folder": run.history.parent,
        "is_of_here": run.is_trusted,
        "cd": format_cd(run.working_folder),
        "cd_powershell": format_cd(run.working_folder, in_powershell=True),
        "others": other_runs,
        "messages": run_history.messages[-MAX_MESSAGES:],
    }


def read_shape(runs: Runs, folder: Path, sample_names: Sequence[str]) -> str:
    """Return the newest sample's aspect ratio as a CSS value; "" if there is no sample.

    The page reserves space for samples that are loaded later.
    """
    path = folder / SAMPLES / sample_names[-1] if sample_names else None
    if path is None or path.suffix == ".wav" or not runs.is_inside(path):
        return ""
    with contextlib.suppress(OSError, UserError):
        return _read_shape(path, path.stat().st_mtime_ns)
    return ""


@functools.lru_cache(maxsize=256)
def _read_shape(path: Path, changed: int) -> str:
    """Read the shape of a file with this modification time. Raises MediaError if it cannot be read."""
    if path.suffix == ".png":
        width, height = image_size(path)
    else:
        info = video_info(path)
        width, height = info.width, info.height
    return f"{width} / {height}"


def mark_page(run_history: RunHistory, live_state: LiveRunState) -> str:
    """Return a digest that changes whenever the browser has to reload the page of a run."""
    events = (
        run_history.samples,
        run_history.saved,
        run_history.messages,
        run_history.validations,
        run_history.starts,
    )
    counts = [len(event) for event in events]
    return short_digest(repr((counts, run_history.memory, live_state.displayed.text)))


def collect_news(
    runs: Runs, run: RunSummary, query: Mapping[str, str], kill_message: str = ""
) -> dict[str, Any]:
    """Return the values that the page of a training run polls, with its curves if they have changed.

    1. Read the state of the run.
    2. Compute a key of everything on which the curves depend.
    3. Add the curves, unless the browser already has the curves with this key.

    Args:
        query: `have`, the key of an earlier response; `from` and `to`, the range of shown steps.
        kill_message: State to show for a run that the page has killed; "" for all other runs.

    Raises:
        OSError: If the history cannot be read.
        ValueError: If the steps are not numbers.
    """
    history = runs.open(run)
    run_history = history.run_history
    live_state = LiveRunState.of(run, run_history, kill_message)
    low = float(query.get("from") or -math.inf)
    high = float(query.get("to") or math.inf)
    inode = history.status and history.status.st_ino  # a new run in this folder writes a new file
    scores = scores_path(run.history.parent, run.name)
    scored_at = scores.stat().st_mtime_ns if scores.is_file() else 0
    # equal keys mean equal curves: then they are not sent again
    key = f"{inode}-{scored_at}-{len(run_history.starts)}-{live_state.displayed.step}-{low}-{high}"
    news = {
        "key": key,
        "page": mark_page(run_history, live_state),
        "state": live_state.state,
        "step": live_state.displayed.step,
        "left": live_state.time_left,
        "name": run.name,
    }
    if query.get("have") != key:
        charts = list_charts(_limit_steps(run_history, low, high), maximum=MAX_POINTS)
        if scored_at:
            score_charts = list_score_charts(
                run.history.parent, run.name, run_history=run_history, low=low, high=high
            )
            charts[1:1] = score_charts  # after the loss
        news["charts"] = [asdict(chart) for chart in charts]
        news["tiles"] = list_tiles(live_state.displayed, run_history)
    return news


def _limit_steps(run_history: RunHistory, low: float, high: float) -> RunHistory:
    """Return a history with its curves limited to the steps from `low` to `high`."""

    def cut(points: Points) -> Points:
        return {step: value for step, value in points.items() if low <= step <= high}

    if math.isinf(low) and math.isinf(high):  # no range was requested
        return run_history
    return replace(
        run_history,
        loss=cut(run_history.loss),
        seconds=cut(run_history.seconds),
        # not by `cut`: a loss of a validation is never None
        validations={step: loss for step, loss in run_history.validations.items() if low <= step <= high},
        rates={name: cut(points) for name, points in run_history.rates.items()},
        experts={name: cut(points) for name, points in run_history.experts.items()},
        metrics={name: cut(points) for name, points in run_history.metrics.items()},
        validations_by_level={name: cut(points) for name, points in run_history.validations_by_level.items()},
    )
