"""Make the pages of runs, their curves as JSON and what is said of a file; write a run as one page."""

import hashlib
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from browser.runs import RUNNING, STATES, Glance, Runs, tell_left, tell_state
from modules.control_codes import escape_control_codes, shorten
from modules.errors import OptionError
from modules.pages.page import render_page
from modules.text_files import read_safetensors_texts
from training.reports.history import Points, Story
from training.reports.page import (
    TEMPLATE,
    ClipStore,
    PageCommand,
    PageFacts,
    link,
    list_charts,
    list_tiles,
    page_values,
    write_training_page,
)
from training.reports.sample_files import FOLDER as SAMPLES

HERE = Path(__file__).resolve().parent
MOST_RUNS = 200  # of a list, until all are asked for
MOST_SAMPLES = (2000, 100)  # columns and rows of the grid
MOST_POINTS = 1500  # of a curve; zooming shows more
MOST_MESSAGES = 500
SEEN = 20  # steps that the time left is told by
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
    """Return the runs that a list is asked for, in its order. asked: text, family, state and sort."""
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
    """Return a text that changes with the page of all runs."""
    told = [(run.id, run.changed, run.state) for run in found]
    return hashlib.blake2s(repr((told, sorted(asked.items()))).encode(), digest_size=12).hexdigest()


def list_page(runs: Runs, found: Sequence[Glance], asked: Mapping[str, str]) -> str:
    """Return the page of all runs. found: what `Runs.look` gave."""
    chosen = select_runs(found, asked)
    values = {
        "runs": chosen if asked.get("all") else chosen[:MOST_RUNS],
        "chosen": len(chosen),
        "count": len(found),
        "running": sum(run.state == RUNNING for run in found),
        "families": sorted({run.model for run in found if run.model}),
        "asked": {name: asked.get(name, "") for name in ("text", "family", "state", "sort", "all")},
        "states": STATES,
        "sorts": list(SORTS),
        "roots": runs.roots,
    }
    return render_page(HERE / "runs.html", "Runs", values, POLICY)


@dataclass(frozen=True)
class Standing:
    """Hold how a run stands now."""

    facts: PageFacts
    step: int
    text: str
    kind: str  # good or bad, see `write_training_page`
    state: str
    left: str  # words on the time left

    @classmethod
    def of(cls, run: Glance, story: Story) -> "Standing":
        """Return how the run of a history stands."""
        facts = told_facts(story, run.history.parent, run.name)
        if story.start is None:  # an older version's, whose page tells some of it
            facts = replace(facts, model=run.model, total_steps=run.total_steps)
        ending = story.ending or (None if story.start else run.ending)
        state = tell_state(story.start, ending, run.changed)
        step = next(reversed(story.loss or story.starts or {0: None}))
        text, kind = ending or (f"died after step {step:,}, without a word", "bad")
        if state == RUNNING:
            text, kind = state, ""
        seconds = [each for each in [*story.seconds.values()][-SEEN:] if each is not None]
        left = tell_left(facts.total_steps - step, statistics.median(seconds) if seconds else None)
        return cls(facts, step, text, kind, state, f"· {left} left" if left and state == RUNNING else "")


@dataclass
class LinkedClips:
    """Give the grid its clips as tags that a script fills once they are in view."""

    now: Callable[[], float] = time.monotonic
    clips: dict[str, Markup] = field(default_factory=dict)

    def load(self, name: str, prompt: str, step: int, deadline: float) -> Markup:
        """Return the tag of a sample, with words for those who cannot see it."""
        tag = '<span id="{0}" data-src="{0}" role="img" aria-label="{1}"></span>'
        return Markup(tag).format(link(SAMPLES, name), f"{prompt}, step {step}")


def told_facts(story: Story, folder: Path, name: str) -> PageFacts:
    """Return the facts that a history tells, for a page that its run does not write."""
    start = story.start
    commands = [PageCommand(*texts) for texts in story.commands if len(texts) == len(fields(PageCommand))]
    return PageFacts(
        name,
        start.model if start else "",
        folder,
        start.total_steps if start else max(story.loss, default=0),
        start.changed if start else [],
        start.unchanged if start else [],
        lambda best, is_finished: commands,
        lambda: [(line[0], line[-1]) for line in story.memory if line],
        start is not None and start.listens,
    )


def run_page(runs: Runs, run: Glance, can_write: bool) -> str:
    """Return the page of a run. Raises OSError if its history cannot be read."""
    story = runs.open(run).story
    now = Standing.of(run, story)
    values = page_values(now.facts, story, LinkedClips(), now.step, now.text, now.kind, MOST_SAMPLES)
    values["live"] = {
        "id": run.id,
        "left": now.left,
        "can_ask": can_write and now.facts.listens and now.state == RUNNING,
        "others": [(one.id, one.name) for one in runs.look() if one.id != run.id],
        "messages": story.messages[-MOST_MESSAGES:],
    }
    return render_page(TEMPLATE, run.name, values, POLICY)


def tell_news(runs: Runs, run: Glance, asked: Mapping[str, str]) -> dict[str, Any]:
    """Return what a page of a run asks for again and again: its curves, if they are not those that it has.

    asked: `have`, the key of an earlier answer; `from` and `to`, the steps that are shown. Raises OSError if
    the history cannot be read, ValueError if the steps are no numbers.
    """
    shown = runs.open(run)
    story = shown.story
    now = Standing.of(run, story)
    events = [
        len(one) for one in (story.samples, story.saved, story.messages, story.validations, story.starts)
    ]
    page = hashlib.blake2s(repr((events, story.memory, now.text)).encode(), digest_size=8).hexdigest()
    low, high = (float(asked.get(name) or number) for name, number in (("from", -math.inf), ("to", math.inf)))
    key = f"{shown.status and shown.status.st_ino}-{len(story.starts)}-{now.step}-{low}-{high}"
    news = {
        "key": key,
        "page": page,
        "state": now.state,
        "step": now.step,
        "left": now.left,
        "name": run.name,
    }
    if asked.get("have") != key:
        charts = list_charts(_narrow(story, low, high), MOST_POINTS)
        news["charts"] = [asdict(chart) for chart in charts]
        news["tiles"] = list_tiles(now.facts, story, now.step)
    return news


def _narrow(story: Story, low: float, high: float) -> Story:
    """Return a story with the curves within these steps."""

    def cut(points: Points) -> Points:
        return {step: value for step, value in points.items() if low <= step <= high}

    if math.isinf(low) and math.isinf(high):
        return story
    rates, experts, bands = (
        {name: cut(points) for name, points in named.items()}
        for named in (story.rates, story.experts, story.bands)
    )
    validations = {step: loss for step, loss in story.validations.items() if low <= step <= high}
    loss, seconds = cut(story.loss), cut(story.seconds)
    return replace(
        story,
        loss=loss,
        seconds=seconds,
        rates=rates,
        experts=experts,
        bands=bands,
        validations=validations,
    )


def file_of(runs: Runs, run: Glance, name: str) -> Path | None:
    """Return a file that a page links: a saved file, a sample or a clip. None if there is no such one."""
    story = runs.open(run).story
    folder = run.history.parent
    samples = {f"{SAMPLES}/{file}" for row in story.samples.values() for file in row.files.values()}
    is_known = name in story.saved or name in samples or COMPARED.fullmatch(name)
    return folder / name if is_known and runs.is_inside(folder / name) else None


class FileNotes:
    """Tell hash and metadata of files, each hashed once."""

    def __init__(self) -> None:
        self._hashes: dict[tuple[str, int, int], str] = {}

    def hash(self, path: Path) -> str:
        """Return the SHA-256 of a file, as letters. Raises OSError if it cannot be read."""
        status = path.stat()
        key = (str(path), status.st_mtime_ns, status.st_size)
        if key not in self._hashes:
            with path.open("rb") as file:
                self._hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._hashes[key]

    def tell(self, path: Path) -> str:
        """Return a piece of a page. Raises OSError if the file cannot be read."""
        digest = self.hash(path)
        try:
            texts = read_safetensors_texts(path)
        except ValueError:
            texts = {}
        rows = {"SHA-256": digest}
        rows |= {name: escape_control_codes(shorten(text, MOST_TEXT)) for name, text in sorted(texts.items())}
        line = Markup("<tr><td>{}</td><td>{}</td></tr>")
        return Markup("<table>{}</table>").format(Markup("").join(line.format(*row) for row in rows.items()))


def export_run(runs: Runs, path: Path) -> None:
    """Write the only run as a page that needs no server. Raises OptionError if there is none, or several."""
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
    now = Standing.of(run, story)
    clips = ClipStore(run.history.parent / SAMPLES)
    write_training_page(path, now.facts, story, clips, now.step, now.text, now.kind)
