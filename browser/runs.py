"""Find runs below folders by their histories, and summarise each from a few parts of its file."""

import contextlib
import hashlib
import html
import math
import mmap
import os
import re
import statistics
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # comes with accelerate

from modules.atomic_write import identify_machine
from modules.console import in_words
from modules.limits import MAX_LINE_CHARACTERS
from modules.text_files import real_path
from training.reports.history import (
    BEFORE_TRAINING,
    END,
    HIGHEST,
    PREDICTED,
    SHOWN,
    Row,
    Start,
    Story,
    history_name,
    history_path,
    parse_row,
)
from training.reports.page import page_path
from training.reports.sample_files import FOLDER as SAMPLES

RUNNING, FINISHED, STOPPED, DIED = STATES = ("running", "finished", "stopped", "died")
ELSEWHERE_SECONDS = 300  # a run of another machine that has written nothing for so long has died
SAME_SECONDS = 2.0  # the clock that a start is told by may have been set since
CONFIG = ".toml"  # of datasets
DEEPEST = 12  # folders below a given one
WHOLE = 32 << 10  # bytes of a history that is read whole
NEAR_END = 512 << 10  # how far from its end the last samples are looked for
LAST = 8 << 10  # bytes of its end that tell the step and its seconds
SPOTS, SPOT = 48, 400  # places that a sparkline is made of; bytes of each
LOSS = re.compile(rb'"step": (\d{1,15}), "loss": (-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)')
AVERAGE = re.compile(rb'"average": (-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)')
LEFT = re.compile(rb'"left": (\d+(?:\.\d+)?(?:e[-+]?\d+)?)')
SECONDS = re.compile(rb'"seconds": (\d+(?:\.\d+)?(?:e[-+]?\d+)?)')
# matches a page of an older version: kind, standing, model, step, total
STATUS = re.compile(
    r'<p class="status"><span class="(\w*)">([^<]*)</span>\s*<small>· (\S+) · [^<]*</small></p>\s*'
    r'<progress value="(\d{1,15})" max="(\d{1,15})">'
)


def is_living(process: Mapping[str, Any]) -> bool | None:
    """Return whether a process of `describe_process` is alive; None if it is not of this machine."""
    if process.get("machine") != identify_machine():
        return None
    try:
        found = psutil.Process(process["number"])
        is_same = abs(found.create_time() - process["born"]) < SAME_SECONDS
        return is_same and found.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, TypeError, LookupError, OverflowError):
        return False


@dataclass(frozen=True)
class Glance:
    """Hold the facts that a list shows of a run."""

    history: Path
    changed: float  # when the file was changed
    start: Start | None
    ending: tuple[str, str] | None
    step: int
    losses: Sequence[float]
    step_seconds: float | None
    sample: str  # name of the newest one; empty: there is none
    memory: dict[str, str]
    model: str = ""
    total_steps: int = 0
    average: float | None = None  # mean loss, as the run's own bar shows it; None: an older version's history
    seconds_left: float | None = None  # with samples, validations and saves; None: an older version's
    doing: str = ""  # current work between two steps, or before the first

    @property
    def id(self) -> str:
        return hashlib.blake2s(os.fsencode(self.history), digest_size=8).hexdigest()

    @property
    def name(self) -> str:
        return history_name(self.history)

    @property
    def state(self) -> str:
        return tell_state(self.start, self.ending, self.changed)

    @property
    def left(self) -> str:
        if self.seconds_left and self.state == RUNNING:
            return in_words(self.seconds_left)
        return tell_left(self.total_steps - self.step, self.step_seconds) if self.state == RUNNING else ""

    @property
    def is_of_here(self) -> bool:
        """Return whether this machine wrote the history, since its boot, into the folder where it lies.

        Commands of other machines may be somebody else's, or name files that are not here.
        """
        if self.start is None or is_living(self.start.process) is None:
            return False
        typed = self.start.written_in or dict(self.start.changed).get("output_dir")
        if not typed:
            return False
        here = os.path.normcase(real_path(self.history.parent))
        if Path(typed).is_absolute():
            return here == os.path.normcase(real_path(Path(typed)))
        # an older version's: from which folder it was typed is not known
        parts = Path(os.path.normcase(os.path.normpath(typed))).parts
        parts = tuple(part for part in parts if part != os.pardir)
        return Path(here).parts[len(Path(here).parts) - len(parts) :] == parts

    @property
    def working_folder(self) -> Path | None:
        """Return the folder in which the command was typed; None if it is not known.

        A folder that was moved or copied together with the run's is found at its new place.
        """
        if self.start is None or not self.start.working_folder or not self.start.written_in:
            return None
        typed_in, written_in = Path(self.start.working_folder), Path(self.start.written_in)
        here = real_path(self.history.parent)
        if written_in == here:
            return typed_in
        if not written_in.is_relative_to(typed_in):
            return None
        inner = written_in.relative_to(typed_in).parts
        outer = here.parts[: len(here.parts) - len(inner)]
        return Path(*outer) if outer and (*outer, *inner) == here.parts else None

    @property
    def network(self) -> str:
        return Path(dict(self.start.changed).get("dit", "") if self.start else "").name

    @property
    def loss(self) -> float:
        """Return the average of the newest losses; infinite if there is none."""
        return (
            statistics.fmean(self.losses[-5:])
            if self.average is None and self.losses
            else self.average or math.inf
        )

    @property
    def used(self) -> str:
        highest, predicted = (self.memory.get(name, "") for name in (HIGHEST, PREDICTED))
        known = [text for text in (highest, predicted) if text.endswith("GiB")]
        return " of ".join(known) if highest in known else ""

    @property
    def spark(self) -> str:
        """Return the points of the loss sparkline, 100 wide and 24 high."""
        if len(self.losses) < 2:
            return ""
        low, high = min(self.losses), max(self.losses)
        width = 100 / (len(self.losses) - 1)
        height = 22 / ((high - low) or 1)
        return " ".join(
            f"{index * width:.1f},{23 - (loss - low) * height:.1f}" for index, loss in enumerate(self.losses)
        )


def tell_state(start: Start | None, ending: tuple[str, str] | None, changed: float) -> str:
    """Return the state of a run. changed: when its history was modified, in seconds since 1970."""
    if ending is not None:
        return {"good": FINISHED, "bad": DIED}.get(ending[1], STOPPED)
    is_there = is_living(start.process) if start is not None else None
    if is_there is None:  # nothing of this machine tells
        is_there = time.time() - changed < ELSEWHERE_SECONDS
    return RUNNING if is_there else DIED


def tell_left(steps: int, seconds: float | None) -> str:
    return in_words(steps * seconds) if seconds is not None and steps > 0 else ""


def read_page_status(history: Path) -> tuple[str, tuple[str, str] | None, int] | None:
    """Return model, ending and total steps from the page beside a history of an older version."""
    with contextlib.suppress(OSError), page_path(history.parent, history_name(history)).open("rb") as file:
        found = STATUS.search(file.read(32 << 10).decode("utf-8", "replace"))
        if found:
            ending = None if found[2] == "running" else (html.unescape(found[2]), found[1])
            return html.unescape(found[3]), ending, int(found[5])
    return None


def read_glance(path: Path, status: os.stat_result) -> Glance:
    """Read the few lines of a history that a list shows. Raises OSError if it cannot be read."""
    with path.open("rb") as file, contextlib.ExitStack() as stack:
        data: Any = (
            file.read()
            if status.st_size <= WHOLE
            else stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        )
        size = len(data)
        tail = data[-(64 << 10) :]
        ending = _last_row(tail, "ended", 0)
        # of a run that may be running the newest process counts, wherever its line is
        started = _last_row(data, "started", 0 if ending is None else max(0, size - NEAR_END)) or _last_row(
            data[: 64 << 10], "started", 0
        )
        if started is not None and tail.rfind(b', "started": ') > tail.rfind(b', "ended": '):
            ending = None  # it was resumed after it had ended
        others = [_last_row(data, key, size - NEAR_END) for key in ("samples", "memory")]
        story = Story.of(filter(None, [started, *others, ending]))
        found = LOSS.findall(tail[-LAST:]) or LOSS.findall(tail)  # long lines may follow the last step
        spots = (
            LOSS.findall(data)
            if size <= WHOLE
            else [
                (spot[1], spot[2])
                for place in range(0, size - SPOT, max(1, (size - SPOT) // SPOTS))
                if (spot := LOSS.search(data[place : place + SPOT])) is not None
            ]
        )
        losses = [float(loss) for _, loss in spots]
        # neighbours become their mean: fewer than two times SPOTS are left
        width = max(1, len(losses) // SPOTS)
        seconds = [float(each) for each in SECONDS.findall(tail[-LAST:])]
        samples = [row.files for row in story.samples.values() if row.files]
        told = None if story.start else read_page_status(path)
        step = int(found[-1][0]) if found else max(story.starts, default=0)
        return Glance(
            path,
            status.st_mtime,
            story.start,
            story.ending or (told[1] if told else None),
            step,
            [statistics.fmean(losses[index : index + width]) for index in range(0, len(losses), width)],
            statistics.fmean(seconds[-SHOWN:]) if seconds else None,
            samples[-1][min(samples[-1])] if samples else "",
            dict(story.memory),
            story.start.model if story.start else told[0] if told else "",
            story.start.total_steps if story.start else told[2] if told else step,
            float(averages[-1]) if (averages := AVERAGE.findall(tail)) else None,
            float(left[-1]) if (left := LEFT.findall(tail)) else None,
            doing=find_doing(tail),
        )


def find_doing(tail: bytes) -> str:
    """Return the work between two steps that the end of a history tells; empty if a step followed it."""
    row = _last_row(tail, "doing", 0)
    place = tail.rfind(b', "doing": ')
    later = ("loss", "ended", "started", "samples")
    is_over = any(tail.rfind(f', "{key}": '.encode()) > place for key in later)
    return "" if row is None or is_over else str(row["doing"])


def _last_row(data: Any, key: str, least: int) -> Row | None:
    """Return the last line that has this key and begins at or behind the offset `least`."""
    place = data.rfind(f', "{key}": '.encode(), max(0, least))
    if place < 0:
        return None
    begin, end = data.rfind(b"\n", 0, place) + 1, data.find(b"\n", place)
    return parse_row(data[begin : end + 1]) if end >= 0 else None


@dataclass
class OpenHistory:
    """Hold the content of a history that is shown; `refresh` reads only appended lines."""

    path: Path
    status: os.stat_result | None = None
    story: Story = field(default_factory=Story)
    _offset: int = 0

    def refresh(self) -> None:
        """Read what is new. Raises OSError if the file cannot be read."""
        with self.path.open("rb") as file:
            status, before = os.fstat(file.fileno()), self.status
            if before is None or before.st_ino != status.st_ino or status.st_size < self._offset:
                self.story, self._offset = Story(), 0
            self.status = status
            file.seek(self._offset)
            for line in iter(lambda: file.readline(MAX_LINE_CHARACTERS), b""):
                if not line.endswith(b"\n"):
                    break  # it is being written
                self._offset += len(line)
                row = parse_row(line)
                if row is not None and "session" in row:
                    self.story = Story()
                elif row is not None:
                    self.story.add(row)


class Runs:
    """Find the runs below some folders. Links are resolved; whatever is outside of the folders is ignored."""

    def __init__(self, folders: Collection[Path]) -> None:
        """folders: folders, or history files."""
        self.roots = [real_path(folder) for folder in folders]
        # time, folders in it, histories, .toml files
        self._folders: dict[Path, tuple[int, list[Path], list[Path], list[Path]]] = {}
        self._glances: dict[str, tuple[tuple[int, int, int], Glance]] = {}
        self._open: dict[Path, OpenHistory] = {}
        self.lock = threading.RLock()  # of all that is known here, stories too

    def look(self) -> list[Glance]:
        """Return all runs, the newest first."""
        with self.lock:
            found: dict[str, tuple[tuple[int, int, int], Glance]] = {}
            for path in dict.fromkeys(path for root in self.roots for path in self._walk(root, DEEPEST)):
                with contextlib.suppress(OSError):
                    found[str(path)] = self._glance(path)
            self._glances = found
            shown = [one for _, one in found.values() if not self._has_begun(one)]
            return sorted(shown, key=lambda one: -one.changed)

    def _has_begun(self, run: Glance) -> bool:
        """Return whether a run is only what `run` did before a training that writes its own history now."""
        if not run.name.endswith(BEFORE_TRAINING):
            return False
        training = history_path(run.history.parent, run.name.removesuffix(BEFORE_TRAINING))
        known = self._glances.get(str(training))
        return known is not None and known[1].changed >= run.changed

    def _glance(self, path: Path) -> tuple[tuple[int, int, int], Glance]:
        status, known = path.lstat(), self._glances.get(str(path))
        mark = status.st_mtime_ns, status.st_size, status.st_ino
        return known if known and known[0] == mark else (mark, read_glance(path, status))

    def _walk(self, folder: Path, depth: int) -> Iterator[Path]:
        """Yield histories. A folder that has not changed is not listed again."""
        try:
            changed = folder.stat().st_mtime_ns
            if folder.is_file():
                if folder.suffix != CONFIG:
                    yield folder
                return
            known = self._folders.get(folder)
            if known is None or known[0] != changed:
                known = self._folders[folder] = (changed, *_list_folder(folder))
        except OSError:
            return
        yield from known[2]
        for inner in known[1] if depth else ():
            yield from self._walk(inner, depth - 1)

    def find(self, id: str) -> Glance | None:
        """Return the run of this id, read again; None if there is none."""
        with self.lock:
            known = {one.id: path for path, (_, one) in self._glances.items()}
            if id not in known:
                known = {one.id: str(one.history) for one in self.look()}
            with contextlib.suppress(OSError, KeyError):
                found = self._glances[known[id]] = self._glance(Path(known[id]))
                return found[1]
        return None

    def open(self, run: Glance) -> OpenHistory:
        """Return the current content of a run's history. Raises OSError if it cannot be read."""
        with self.lock:
            shown = self._open.pop(run.history, None) or OpenHistory(run.history)
            shown.refresh()
            self._open[run.history] = shown  # the newest last
            for path in [*self._open][:-MOST_OPEN]:
                del self._open[path]
            return shown

    def configs(self) -> list[Path]:
        with self.lock:
            given = [root for root in self.roots if root.suffix == CONFIG]
            return given + [path for *_, configs in self._folders.values() for path in configs]

    @property
    def tops(self) -> list[Path]:
        """Return the folders that are shown: those given, and those of given files."""
        return [root.parent if root.is_file() else root for root in self.roots]

    def is_inside(self, path: Path) -> bool:
        return self.is_below(path) and path.is_file()

    def is_below(self, path: Path) -> bool:
        """Return whether a path exists and its real path is below the folders."""
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            return False
        return any(real.is_relative_to(top) for top in self.tops)


MOST_OPEN = 8  # histories in memory


def _list_folder(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    inner, histories, configs = [], [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.endswith(END) and entry.is_file(follow_symlinks=False):
                histories.append(Path(entry.path))
            elif name.endswith(CONFIG) and entry.is_file(follow_symlinks=False):
                configs.append(Path(entry.path))
            elif entry.is_dir(follow_symlinks=False) and not (
                name.startswith(".") or name == SAMPLES or name.endswith("-state")
            ):
                inner.append(Path(entry.path))
    return inner, histories, configs
