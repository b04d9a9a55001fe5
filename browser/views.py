"""Make the pages of runs, their curves as JSON and descriptions of files; write a run as one page."""

import hashlib
import logging
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from browser.runs import RUNNING, STATES, Glance, Runs, tell_left, tell_state
from modules.atomic_write import write_text
from modules.control_codes import escape_control_codes, shorten
from modules.errors import OptionError, UserError
from modules.pages.page import END, PRIVATE, render_page
from modules.text_files import read_safetensors_texts, require_regular_file
from training.reports.history import SHOWN, Points, Start, Story
from training.reports.page import (
    TEMPLATE,
    Standing,
    link,
    list_charts,
    list_tiles,
    page_values,
    write_training_page,
)
from training.reports.sample_files import FOLDER as SAMPLES
from training.reports.sample_files import ClipStore

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
PLAYED = (".mp4", ".wav")  # endings of samples that play; others are pictures
MOST_RUNS = 200  # of a list, until all are asked for
MOST_CARDS = 60  # of a list; more are rows of a table, if cards are not asked for
MOST_SAMPLES = (2000, 100)  # columns and rows of the grid
MOST_POINTS = 1500  # of a curve; zooming shows more
MOST_MESSAGES = 500
MOST_TEXT = 4000  # characters of a value of a file's metadata
COMPARED_FOLDER = "compare"  # in the folder of a run: clips that tools/compare.py made
COMPARED = re.compile(rf"{COMPARED_FOLDER}/\d{{3,}}_\d+_[^/\\]+\.(mp4|png)")
# what a page may load: itself, and data of its own
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "media-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'"
)
SORTS = {
    "newest": lambda run: -run.changed,
    "name": lambda run: (run.name.lower(), -run.changed),
    "loss": lambda run: run.loss,
    "progress": lambda run: -run.step / max(run.total_steps, 1),
}


def select_runs(found: Sequence[Glance], asked: Mapping[str, str]) -> list[Glance]:
    """Filter and sort the runs for a list. asked: text, family, state and sort."""
    words = asked.get("text", "").lower().split()
    chosen = [
        run
        for run in found
        if all(word in f"{run.name} {run.model} {run.history.parent}".lower() for word in words)
        and asked.get("family") in (None, "", run.model)
        and asked.get("state") in (None, "", run.state)
    ]
    return sorted(chosen, key=SORTS.get(asked.get("sort", ""), SORTS["newest"]))


def mark_list(found: Sequence[Glance], asked: Mapping[str, str]) -> str:
    told = [(run.id, run.changed, run.state) for run in found]
    return hashlib.blake2s(repr((told, sorted(asked.items()))).encode(), digest_size=12).hexdigest()


def list_page(runs: Runs, found: Sequence[Glance], asked: Mapping[str, str]) -> str:
    """Return the page of all runs. found: the result of `Runs.look`."""
    chosen = select_runs(found, asked)
    values = {
        "runs": label_runs(chosen if asked.get("all") else chosen[:MOST_RUNS]),
        "is_table": asked.get("view") == "table"
        or (len(chosen) > MOST_CARDS and asked.get("view") != "cards"),
        "date": lambda run: f"{datetime.fromtimestamp(run.changed):%Y-%m-%d %H:%M}",
        "chosen": len(chosen),
        "count": len(found),
        "running": sum(run.state == RUNNING for run in found),
        "families": sorted({run.model for run in found if run.model}),
        "asked": {name: asked.get(name, "") for name in ("text", "family", "state", "sort", "view", "all")},
        "states": STATES,
        "sorts": list(SORTS),
        "roots": runs.roots,
    }
    return render_page(HERE / "runs.html", "Runs", values, POLICY)


def label_runs(found: Sequence[Glance]) -> list[tuple[Glance, str]]:
    """Return each run with its label: the name, with the folder if several runs have that name."""
    names = Counter(run.name for run in found)
    return [
        (run, run.name if names[run.name] == 1 else f"{run.name} in {run.history.parent.name}")
        for run in found
    ]


@dataclass(frozen=True)
class LiveStanding:
    """Hold the current standing of a run."""

    shown: Standing
    state: str
    left: str  # words on the time left

    @classmethod
    def of(cls, run: Glance, story: Story) -> "LiveStanding":
        """Return the current standing of the run of a history."""
        # an older version's history has no start, and its page tells some of it
        start = story.start or Start(run.model, run.total_steps)
        ending = story.ending or (None if story.start else run.ending)
        state = tell_state(story.start, ending, run.changed)
        step = next(reversed(story.loss or story.starts or {0: None}))
        text, kind = ending or (f"died after step {step:,}, without a word", "bad")
        if state == RUNNING:
            text, kind = state, ""
        seconds = [each for each in story.seconds.values() if each is not None][-SHOWN:]
        left = tell_left(start.total_steps - step, statistics.fmean(seconds) if seconds else None)
        words = f"· {left} left" if left and state == RUNNING else ""
        if state == RUNNING and (story.doing or story.left):
            words = f"· {story.doing}" if story.doing else f"· {run.left} left"
        return cls(Standing(start, step, text, kind), state, words)


def linked_clip(name: str, prompt: str, step: int, _: bool) -> Markup:
    tag = '<span id="{0}" data-src="{0}" role="img" aria-label="{1}"></span>'
    return Markup(tag).format(link(SAMPLES, name), f"{prompt}, step {step}")


def run_page(runs: Runs, run: Glance, can_write: bool, is_paused: bool = False) -> str:
    """Return the page of a run. is_paused: no job of the queue begins.

    Raises OSError if its history cannot be read.
    """
    story = runs.open(run).story
    now = LiveStanding.of(run, story)
    values = page_values(run.history.parent, story, now.shown, linked_clip, MOST_SAMPLES)
    values["live"] = {
        "id": run.id,
        "mark": mark_page(story, now),
        "left": now.left,
        "name": run.name,
        "can_ask": can_write and now.shown.start.listens and now.state == RUNNING,
        "can_sample": bool(dict(now.shown.start.changed).get("sample_prompts")),
        "can_queue": can_write,
        "plays": any(name.endswith(PLAYED) for row in story.samples.values() for name in row.files.values()),
        "is_paused": is_paused,
        "is_of_here": run.is_of_here,
        "others": [(one.id, label) for one, label in label_runs(runs.look()) if one.id != run.id],
        "messages": story.messages[-MOST_MESSAGES:],
    }
    return render_page(TEMPLATE, run.name, values, POLICY)


def mark_page(story: Story, now: LiveStanding) -> str:
    events = [
        len(one) for one in (story.samples, story.saved, story.messages, story.validations, story.starts)
    ]
    return hashlib.blake2s(repr((events, story.memory, now.shown.text)).encode(), digest_size=8).hexdigest()


def tell_news(runs: Runs, run: Glance, asked: Mapping[str, str]) -> dict[str, Any]:
    """Return the facts that a run's page polls, with its curves if they have changed.

    asked: `have`, the key of an earlier answer; `from` and `to`, the steps that are shown. Raises OSError if
    the history cannot be read, ValueError if the steps are no numbers.
    """
    shown = runs.open(run)
    story = shown.story
    now = LiveStanding.of(run, story)
    low, high = (float(asked.get(name) or number) for name, number in (("from", -math.inf), ("to", math.inf)))
    key = f"{shown.status and shown.status.st_ino}-{len(story.starts)}-{now.shown.step}-{low}-{high}"
    news = {
        "key": key,
        "page": mark_page(story, now),
        "state": now.state,
        "step": now.shown.step,
        "left": now.left,
        "name": run.name,
    }
    if asked.get("have") != key:
        charts = list_charts(_narrow(story, low, high), MOST_POINTS)
        news["charts"] = [asdict(chart) for chart in charts]
        news["tiles"] = list_tiles(now.shown, story)
    return news


def _narrow(story: Story, low: float, high: float) -> Story:
    """Return a story whose curves are limited to these steps."""

    def cut(points: Points) -> Points:
        return {step: value for step, value in points.items() if low <= step <= high}

    if math.isinf(low) and math.isinf(high):
        return story
    named: dict[str, Any] = {
        name: {each: cut(points) for each, points in getattr(story, name).items()}
        for name in ("rates", "experts", "bands")
    }
    validations = {step: loss for step, loss in story.validations.items() if low <= step <= high}
    loss, seconds = cut(story.loss), cut(story.seconds)
    return replace(story, loss=loss, seconds=seconds, validations=validations, **named)


def file_of(runs: Runs, run: Glance, name: str) -> Path | None:
    """Return the path of a file that a page links (a saved file, a sample, a clip); None for other names."""
    story = runs.open(run).story
    folder = run.history.parent
    samples = {f"{SAMPLES}/{file}" for row in story.samples.values() for file in row.files.values()}
    is_known = name in story.saved or name in samples or COMPARED.fullmatch(name)
    return folder / name if is_known and runs.is_inside(folder / name) else None


class FileNotes:
    """Describe files by hash and metadata; hashes are computed once."""

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

    def tell(self, path: Path) -> str:
        """Return HTML that describes a file. Raises OSError if it cannot be read."""
        digest = self.hash(path)
        try:
            texts = read_safetensors_texts(path)
        except ValueError:
            texts = {}
        rows = {"SHA-256": digest}
        rows |= {name: escape_control_codes(shorten(text, MOST_TEXT)) for name, text in sorted(texts.items())}
        line = Markup("<tr><td>{}</td><td>{}</td></tr>")
        return Markup("<table>{}</table>").format(Markup("").join(line.format(*row) for row in rows.items()))


GENERATOR = '<meta name="generator" content="reelsmith">'  # of base.html
_MARKED = re.compile(rf"{PRIVATE}(?:(?!{PRIVATE}).)*?{END}\n?", re.DOTALL)
_FILE_LINK = re.compile(r'<a href="\./[^"]*">')


def share_page(page: Path, copy: Path) -> None:
    """Write a copy of a page without private facts and links. Raises UserError if it is no page of ours."""
    try:
        require_regular_file(page)
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        why = "is a folder" if page.is_dir() else f"cannot be read ({reason})"
        raise UserError(f"{page} {why}. Give a page that this program wrote, a .html file.") from None
    if GENERATOR not in text[:2000]:
        raise UserError(f"{page} is not a page of this program, or an older one. Make it again.")
    count = 1
    while count:  # the innermost ones first: folders are marked in commands too
        text, count = _MARKED.subn("", text)
    write_text(copy, _FILE_LINK.sub("<a>", text))
    logger.info("wrote %s", copy)


def export_run(runs: Runs, path: Path) -> None:
    """Write the only run as a page that needs no server. Raises OptionError if there is not one run."""
    found = runs.look()
    if len(found) != 1:
        names = ", ".join(str(run.history) for run in found[:5])
        problem = (
            f"there are {len(found)} runs below it: give the history of one, {names}"
            if found
            else "no run there"
        )
        raise OptionError(f"--export {path}: {problem}")
    (run,) = found
    try:
        story = runs.open(run).story
    except OSError as error:
        raise OptionError(f"{run.history} cannot be read: {error.strerror}") from None
    clips = ClipStore(run.history.parent / SAMPLES)
    write_training_page(path, run.history, story, LiveStanding.of(run, story).shown, clips.for_page())
    share_page(path, path)  # it is made to be given away: no folder of this machine is named
