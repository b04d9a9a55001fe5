"""Build the pages of runs, their curves as JSON and descriptions of files; write a run as one page."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from browser.core.state_names import name_state
from browser.jobs.printed_lines import translate_line
from browser.runs.run_start import read_run_state
from browser.runs.runs import (
    DIED,
    RUNNING,
    STOPPED,
    Runs,
    RunSummary,
    compute_mean,
    describe_left,
    find_state,
)
from modules.atomic_write import write_text
from modules.control_codes import escape_control_codes, shorten
from modules.errors import OptionError, UserError
from modules.pages.language import join, say
from modules.pages.page import END, PRIVATE, link, show_unscripted
from modules.text_files import read_safetensors_texts, require_regular_file
from training.reports.history import (
    BEFORE_TRAINING,
    SHOWN,
    WORKFLOW,
    RunHistory,
    Start,
    find_workflow,
)
from training.reports.page import (
    Standing,
    write_training_page,
)
from training.reports.sample_files import ClipStore
from training.reports.sections import SAMPLES

logger = logging.getLogger(__name__)

MAX_TEXT = 4000  # characters of a value of a file's metadata
COMPARED_FOLDER = "compare"  # in the folder of a run: clips that tools/compare.py made
COMPARED = re.compile(rf"{COMPARED_FOLDER}/\d{{3,}}_\d+_[^/\\]+\.(mp4|png)")


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


PLAYED = (".mp4", ".wav")  # suffixes of samples with a player; others are images
