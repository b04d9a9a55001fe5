"""Build the pages of runs, their curves as JSON and descriptions of files; write a run as one page."""

import contextlib
import functools
import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from browser.command_lines import format_cd
from browser.printed_lines import translate_command, translate_line, translate_memory
from browser.run_start import read_run_state
from browser.runs import DIED, RUNNING, STOPPED, Runs, RunSummary, compute_mean, describe_left, find_state
from browser.short_names import short_digest
from browser.state_names import name_state
from modules.atomic_write import write_text
from modules.control_codes import escape_control_codes, shorten
from modules.errors import OptionError, UserError
from modules.media.reading import image_size, video_info
from modules.pages.language import join, say
from modules.pages.page import END, PRIVATE, link, render_page, show_unscripted
from modules.text_files import read_safetensors_texts, require_regular_file
from training.reports.history import (
    BEFORE_TRAINING,
    SHOWN,
    WORKFLOW,
    Points,
    RunHistory,
    Start,
    find_workflow,
)
from training.reports.page import (
    TEMPLATE,
    Standing,
    list_charts,
    list_tiles,
    page_values,
    write_training_page,
)
from training.reports.present_files import current_commands
from training.reports.sample_files import ClipStore
from training.reports.scores import list_score_charts
from training.reports.sections import SAMPLES, scores_path

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
PLAYED = (".mp4", ".wav")  # suffixes of samples with a player; others are images
MAX_SAMPLES = (2000, 100)  # columns and rows of the grid
MAX_POINTS = 1500  # maximum number of points of a curve; zooming shows more
MAX_MESSAGES = 500
MAX_TEXT = 4000  # characters of a value of a file's metadata
COMPARED_FOLDER = "compare"  # in the folder of a run: clips that tools/compare.py made
COMPARED = re.compile(rf"{COMPARED_FOLDER}/\d{{3,}}_\d+_[^/\\]+\.(mp4|png)")
# a page may load only itself and its own data
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "media-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'"
)


def label_runs(runs: Sequence[RunSummary]) -> list[tuple[RunSummary, str]]:
    """Return each run with its label: the name, and the folder too if several runs have that name."""
    counts = Counter(run.shown_name for run in runs)
    labeled_runs = []
    for run in runs:
        label = run.shown_name
        if counts[run.shown_name] > 1:
            folder = run.history.parent
            if folder.name == "output":  # `new` gives all output folders this name
                folder = folder.parent
            label = say("%(name)s in %(name2)s", name=run.shown_name, name2=folder.name)
        labeled_runs.append((run, label))
    return labeled_runs


@dataclass(frozen=True)
class LiveRunState:
    """State and remaining time of a run, as its page shows them."""

    displayed: Standing  # start, step and ending of the run, as text
    state: str  # RUNNING, FINISHED, STOPPED or DIED
    time_left: str

    @classmethod
    def of(cls, run: RunSummary, run_history: RunHistory, kill_message: str = "") -> "LiveRunState":
        """Return the state of a training run according to its history.

        `kill_message` is the text to show for a run that the page has killed; "" for all other runs.
        """
        start, ending = run_history.start, run_history.ending
        if start is None:  # written by an older version: the summary has the values from the run's page
            ending = ending or run.ending
        state = find_state(start, ending, run.changed)
        start = start or Start(run.model, run.total_steps)
        trained_steps = run_history.loss or run_history.starts
        step = next(reversed(trained_steps)) if trained_steps else 0  # keys are steps in their order
        if state == DIED and kill_message:
            return cls(Standing(start, step, kill_message), STOPPED, time_left="")
        if state == RUNNING:
            time_left = _describe_time(run, run_history, start.total_steps - step)
            return cls(Standing(start, step, name_state(state)), state, time_left)
        text, kind = _describe_ending(ending, state, step)
        return cls(Standing(start, step, text, kind), state, time_left="")


def _describe_ending(ending: tuple[str, str] | None, state: str, step: int) -> tuple[str, str]:
    """Return how a run has ended, as text, and the kind of ending; a run without an ending has died."""
    if ending is None:
        return translate_line(say("died after step %(step)s without a message", step=f"{step:,}")), "bad"
    text, kind = ending
    text = translate_line(text)
    if text == state:  # `finished`; the history describes other ends in its own words
        text = name_state(state)
    return text, kind


def _describe_time(run: RunSummary, run_history: RunHistory, steps_left: int) -> str:
    """Describe what a training run does between two steps, such as sampling, or its remaining time."""
    if run_history.doing:
        return join(" ", ("·", read_run_state(run).text))
    if run_history.left:
        return say("· %(left)s left", left=run.left)
    seconds = [number for number in run_history.seconds.values() if number is not None][-SHOWN:]
    left = describe_left(steps_left, compute_mean(seconds) if seconds else None)
    return say("· %(left)s left", left=left) if left else ""


def linked_clip(name: str, prompt: str, step: int) -> Markup:
    """Return the HTML of a sample, whose media the page's script loads later."""
    tag = '<span id="{0}" data-src="{0}" role="img" aria-label="{1}">{2}</span>'
    address = link(SAMPLES, name)
    label = say("%(prompt)s, step %(step)s", prompt=prompt, step=step)
    return Markup(tag).format(address, label, show_unscripted(address))


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
        runs: Runs below the roots.
        run: The run.
        can_write: Whether to show the buttons.
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
    return render_page(TEMPLATE, run.name, values, POLICY)


def _describe_live_run(
    runs: Runs, run: RunSummary, run_history: RunHistory, live_state: LiveRunState
) -> dict[str, Any]:
    """Return the template values that only the server knows, for the page of a run."""
    sample_names = [name for row in run_history.samples.values() for name in row.files.values()]
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
        "others": _list_other_runs(runs, run),
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


def _list_other_runs(runs: Runs, run: RunSummary) -> list[tuple[str, str]]:
    """Return the id and label of all other runs."""
    labeled = label_runs(runs.list_all())
    return [(candidate.id, label) for candidate, label in labeled if candidate.id != run.id]


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
        runs: Runs below the roots.
        run: The run.
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
    scored_at = _find_score_time(run)
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


def _find_score_time(run: RunSummary) -> int:
    """Return when the scores of a run's samples were last written, in nanoseconds; 0 without scores."""
    scores = scores_path(run.history.parent, run.name)
    return scores.stat().st_mtime_ns if scores.is_file() else 0


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


def find_run_file(runs: Runs, run: RunSummary, name: str) -> Path | None:
    """Return the path of a file that a page links (a saved file, sample or clip); None for other names."""
    run_history = runs.open(run).run_history
    folder = run.history.parent
    samples = {f"{SAMPLES}/{file}" for row in run_history.samples.values() for file in row.files.values()}
    is_workflow = name.endswith(WORKFLOW) and any(
        name == find_workflow(folder, saved) for saved in run_history.saved
    )
    is_linked = is_workflow or name in run_history.saved or name in samples or COMPARED.fullmatch(name)
    return folder / name if is_linked and runs.is_inside(folder / name) else None


class FileNotes:
    """Describes weight files by hash and metadata, and caches the hashes."""

    def __init__(self) -> None:
        self._hashes: dict[tuple[str, int, int], str] = {}

    def hash(self, path: Path) -> str:
        """Return the SHA-256 of a file in hexadecimal. Raises OSError if it cannot be read."""
        status = path.stat()
        key = (str(path), status.st_mtime_ns, status.st_size)
        if key not in self._hashes:
            with path.open("rb") as file:
                self._hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._hashes[key]

    def describe(self, path: Path) -> str:
        """Return HTML that describes a file. Raises OSError if it cannot be read."""
        digest = self.hash(path)
        try:
            texts = read_safetensors_texts(path)
        except ValueError:
            texts = {}
        rows = {"SHA-256": digest}
        for name, text in sorted(texts.items()):
            rows[name] = escape_control_codes(shorten(text, MAX_TEXT))
        template = Markup("<tr><td>{}</td><td>{}</td></tr>")
        lines = [template.format(name, text) for name, text in rows.items()]
        return Markup("<table>{}</table>").format(Markup("").join(lines))


GENERATOR = '<meta name="generator" content="reelsmith">'  # the element in base.html
_MARKED = re.compile(rf"{PRIVATE}(?:(?!{PRIVATE}).)*?{END}\n?", re.DOTALL)
_FILE_LINK = re.compile(r'<a href="\./[^"]*">')


def drop_private(text: str) -> str:
    """Return a page's HTML without folder paths and without elements that are marked as private."""
    count = 1
    while count:  # innermost elements first, because marked elements are nested
        text, count = _MARKED.subn("", text)
    return text


def share_page(page: Path, copy: Path) -> None:
    """Write a copy of a run's page without private data and links. Raises UserError for any other page."""
    try:
        require_regular_file(page)
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        problem = "is a folder" if page.is_dir() else f"cannot be read ({reason})"
        raise UserError(f"{page} {problem}. Pass a page that this program wrote, a .html file.") from None
    if GENERATOR not in text[:2000]:  # searches the head of the page
        raise UserError(f"{page} is not a page of this program, or is from an older version. Make it again.")
    write_text(copy, _FILE_LINK.sub("<a>", drop_private(text)))
    logger.info("wrote %s", copy)


def export_run(runs: Runs, path: Path) -> None:
    """Write the only run as a page that needs no server. Raises OptionError if there is not exactly one."""
    all_runs = runs.list_all()
    # the preparation by `run` has a separate history, which is rarely meant to be shared
    candidates = [run for run in all_runs if not run.name.endswith(BEFORE_TRAINING)] or all_runs
    if not candidates:
        raise OptionError(f"--export {path}: no run there")
    if len(candidates) > 1:
        names = ", ".join(str(run.history) for run in candidates[:5])
        raise OptionError(
            f"--export {path}: there are {len(candidates)} runs below it: pass the history of one, {names}"
        )
    (run,) = candidates
    try:
        run_history = runs.open(run).run_history
    except OSError as error:
        raise OptionError(f"{run.history} cannot be read: {error.strerror}") from None
    clips = ClipStore(run.history.parent / SAMPLES)
    live_state = LiveRunState.of(run, run_history)
    write_training_page(path, run.history, run_history, live_state.displayed, load=clips.for_page())
    share_page(path, path)  # the page is meant to be shared: remove all paths of this machine
