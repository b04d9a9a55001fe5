"""Find runs below folders by their histories, and summarize each from a few parts of its file."""

import contextlib
import functools
import html
import math
import mmap
import os
import re
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # comes with accelerate

from browser.core.bin_folder import FOLDER as BIN
from browser.core.short_names import short_digest
from downloads.catalogue import model_title
from modules.atomic_write import identify_machine
from modules.errors import OutputError
from modules.limits import MAX_LINE_CHARACTERS
from modules.pages.language import say, say_duration
from modules.paths import is_on_foreign_share
from modules.text_files import real_path
from training.reports.history import (
    BEFORE_TRAINING,
    END,
    HIGHEST,
    PREDICTED,
    SHOWN,
    Row,
    RunHistory,
    Start,
    history_name,
    history_path,
    parse_row,
)
from training.reports.sections import SAMPLES, page_path

RUNNING, FINISHED, STOPPED, DIED = STATES = ("running", "finished", "stopped", "died")
REMOTE_RUN_TIMEOUT_SECONDS = 300  # a run on another machine counts as dead after this long without output
CLOCK_TOLERANCE_SECONDS = 2.0  # tolerance, because the clock may have been adjusted
CONFIG = ".toml"  # suffix of dataset files
MAX_DEPTH = 12  # maximum depth below a root
FULL_READ_BYTES = 32 << 10  # histories up to this size are read in full
TAIL_BYTES = 64 << 10  # bytes at its end, or its beginning, that are searched for single lines
LAST_SAMPLES_BYTES = 512 << 10  # bytes at its end that are searched for the last samples
LAST_STEP_BYTES = 8 << 10  # bytes at its end that contain the step and its duration
NUM_LOSS_SAMPLES = 48  # positions in a history at which a sparkline samples losses
LOSS_SAMPLE_BYTES = 400  # bytes read at each position
LOSS = re.compile(rb'"step": (\d{1,15}), "loss": (-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)')
AVERAGE = re.compile(rb'"average": (-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)')
LEFT = re.compile(rb'"left": (\d+(?:\.\d+)?(?:e[-+]?\d+)?)')
SECONDS = re.compile(rb'"seconds": (\d+(?:\.\d+)?(?:e[-+]?\d+)?)')
# matches the page of an older version: kind, state, model, step, total
STATUS = re.compile(
    r'<p class="status"><span class="(\w*)">([^<]*)</span>\s*<small>· (\S+) · [^<]*</small></p>\s*'
    r'<progress value="(\d{1,15})" max="(\d{1,15})">'
)


def is_process_alive(process: Mapping[str, Any]) -> bool | None:
    """Return whether a recorded process is alive; None if it ran on another machine or before a reboot."""
    if process.get("machine") != identify_machine():
        return None
    try:
        candidate = psutil.Process(process["number"])  # another process may have this number by now
        was_born_then = abs(candidate.create_time() - process["born"]) < CLOCK_TOLERANCE_SECONDS
        return was_born_then and candidate.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, TypeError, LookupError, OverflowError):
        return False


def is_own_file(path: Path) -> bool:
    """Return whether this user owns a file, because others may share the folder; on Windows, if it exists."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return sys.platform == "win32" or status.st_uid == os.getuid()


@dataclass(frozen=True)
class RunSummary:
    """Summary of a run, as lists show it."""

    history: Path
    changed: float  # modification time
    start: Start | None
    ending: tuple[str, str] | None
    step: int
    losses: Sequence[float]
    step_seconds: float | None
    sample: str  # name of the newest sample; "" if there is none
    memory: dict[str, str]
    model: str = ""
    total_steps: int = 0
    average: float | None = None  # mean loss as in the progress bar; None in old histories
    seconds_left: float | None = None  # includes samples, validations and saves; None in old histories
    doing: str = ""  # current work between two steps, or before the first

    @property
    def title(self) -> str:
        """Display name of the model."""
        return say(model_title(self.model))

    @functools.cached_property
    def id(self) -> str:
        """Short digest of the history's path; identifies the run in URLs."""
        return short_digest(self.history)

    @property
    def name(self) -> str:
        """Name of the run: the name of its history file without the ending."""
        return history_name(self.history)

    @property
    def shown_name(self) -> str:
        """Name of the training run, even while `run` is still preparing it."""
        return self.name.removesuffix(BEFORE_TRAINING)

    @property
    def state(self) -> str:
        """State of the run, derived from its history."""
        return find_state(self.start, self.ending, self.changed)

    @property
    def left(self) -> str:
        """Remaining time as text; "" if the run is not running or the time is not known."""
        if self.state != RUNNING:
            return ""
        if self.seconds_left:
            return say_duration(self.seconds_left)
        return describe_left(self.total_steps - self.step, self.step_seconds)

    @property
    def is_trusted(self) -> bool:
        """Whether this user wrote the history at its current path, on this machine, since its last boot.

        Commands from another machine may be somebody else's, or name files that do not exist here.
        """
        if self.start is None:
            return False
        # None: started on another machine, or before this machine's last boot
        if is_process_alive(self.start.process) is None or not is_own_file(self.history):
            return False
        recorded_folder = self.start.written_in or dict(self.start.changed).get("output_dir")
        if not recorded_folder:
            return False
        # Histories of older versions record a relative path and no working folder: then only the last parts
        # of the paths are compared.
        actual = os.path.normcase(real_path(self.history.parent))
        if Path(recorded_folder).is_absolute():
            return actual == os.path.normcase(real_path(Path(recorded_folder)))
        recorded_parts = Path(os.path.normcase(os.path.normpath(recorded_folder))).parts
        # for `../output`, only `output` can be compared
        comparable_parts = tuple(part for part in recorded_parts if part != os.pardir)
        actual_parts = Path(actual).parts
        return actual_parts[len(actual_parts) - len(comparable_parts) :] == comparable_parts

    @property
    def working_folder(self) -> Path | None:
        """Folder in which the run's command was typed; None if it is not known.

        If this folder was moved or copied together with the run's folder, its new path is returned.
        """
        if self.start is None or not self.start.working_folder or not self.start.written_in:
            return None
        recorded_working_folder = Path(self.start.working_folder)
        recorded_output = Path(self.start.written_in)
        output = real_path(self.history.parent)
        if recorded_output == output:  # the run's folder was not moved
            return recorded_working_folder
        if not recorded_output.is_relative_to(recorded_working_folder):
            return None
        # if the run's folder is at the same path below another folder, that is the moved working folder
        inner_path = recorded_output.relative_to(recorded_working_folder)
        moved_working_folder = output
        for _ in inner_path.parts:
            moved_working_folder = moved_working_folder.parent
        return moved_working_folder if moved_working_folder / inner_path == output else None

    @property
    def network(self) -> str:
        """File name of the base model's transformer (--dit)."""
        return Path(dict(self.start.changed).get("dit", "") if self.start else "").name

    @property
    def loss(self) -> float:
        """Average of the newest losses; infinite if there are none."""
        if self.average is None and self.losses:
            return compute_mean(self.losses[-5:])  # average, because single losses vary
        return self.average or math.inf

    @property
    def used(self) -> str:
        """Peak memory, with the predicted memory if it is known; "" if it was not measured."""
        highest = self.memory.get(HIGHEST, "")
        predicted = self.memory.get(PREDICTED, "")
        if not highest.endswith("GiB"):
            return ""
        return f"{highest} of {predicted}" if predicted.endswith("GiB") else highest

    @functools.cached_property
    def spark(self) -> str:
        """Points of the loss sparkline, an SVG polyline in an area 100 wide and 24 high."""
        if len(self.losses) < 2:
            return ""
        lowest = min(self.losses)
        span = max(self.losses) - lowest
        width = 100 / (len(self.losses) - 1)
        height = 22 / (span or 1)  # a margin of 1 remains above and below
        points = [(index * width, 23 - (loss - lowest) * height) for index, loss in enumerate(self.losses)]
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def compute_mean(numbers: Sequence[float]) -> float:
    """Return the mean; infinity or NaN for a damaged history, where `statistics` would raise an error."""
    return sum(numbers) / len(numbers)


def find_state(start: Start | None, ending: tuple[str, str] | None, changed: float) -> str:
    """Return the state of a run. `changed` is its history's modification time in seconds since 1970."""
    if ending is not None:
        return {"good": FINISHED, "bad": DIED}.get(ending[1], STOPPED)
    is_there = is_process_alive(start.process) if start is not None else None
    if is_there is None:  # the process is on another machine
        is_there = time.time() - changed < REMOTE_RUN_TIMEOUT_SECONDS
    return RUNNING if is_there else DIED


def describe_left(steps: int, seconds: float | None) -> str:
    """Describe the time for `steps` at `seconds` each; "" if it is not known or no steps are left."""
    return say_duration(steps * seconds) if seconds is not None and steps > 0 else ""


class PageStatus(NamedTuple):
    """Values read from the HTML page that an older version wrote next to a run's history."""

    model: str
    ending: tuple[str, str] | None
    total_steps: int


def read_page_status(history: Path) -> PageStatus | None:
    """Read model, ending and total steps from the HTML page next to an older version's history."""
    with contextlib.suppress(OSError), page_path(history.parent, history_name(history)).open("rb") as file:
        match = STATUS.search(file.read(TAIL_BYTES).decode("utf-8", "replace"))
        if match:
            kind, standing, model, _, total_steps = match.groups()
            ending = None if standing == "running" else (html.unescape(standing), kind)
            return PageStatus(html.unescape(model), ending, int(total_steps))
    return None


def read_run_summary(path: Path, status: os.stat_result) -> RunSummary:
    """Read the few lines of a history that a list shows. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size <= FULL_READ_BYTES:  # since `status` it may have been emptied
            return _summarize(path, status, file.read())
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _summarize(path, status, content)


def _summarize(path: Path, status: os.stat_result, content: bytes | mmap.mmap) -> RunSummary:
    """Return the summary of a training run from the content of its history file."""
    # a history may be long, so only its last bytes are searched for the newest values
    tail = content[-TAIL_BYTES:]
    end = tail[-LAST_STEP_BYTES:]
    run_history = _read_run_history(content, tail)
    steps = LOSS.findall(end) or LOSS.findall(tail)  # long lines may follow the last step
    step = int(steps[-1][0]) if steps else max(run_history.starts, default=0)
    if run_history.start is not None:
        model, ending, total_steps = run_history.start.model, None, run_history.start.total_steps
    else:  # an older version wrote these values only into the run's page
        model, ending, total_steps = read_page_status(path) or ("", None, step)
    seconds = [float(text) for text in SECONDS.findall(end)]
    return RunSummary(
        history=path,
        changed=status.st_mtime,
        start=run_history.start,
        ending=run_history.ending or ending,
        step=step,
        losses=_sample_losses(content),
        step_seconds=compute_mean(seconds[-SHOWN:]) if seconds else None,
        sample=_find_newest_sample(run_history),
        memory=dict(run_history.memory),
        model=model,
        total_steps=total_steps,
        average=_read_last_number(AVERAGE, tail),
        seconds_left=_read_last_number(LEFT, tail),
        doing=find_doing(tail),
    )


def _read_run_history(content: bytes | mmap.mmap, tail: bytes) -> RunHistory:
    """Parse only a history's last start, samples, memory and end. `tail` is the end of `content`."""
    near_end = len(content) - LAST_SAMPLES_BYTES
    ending = _read_last_row(tail, "ended", 0)
    # a resumed run has several processes; the newest one counts, wherever its line is in the file
    started = _read_last_row(content, "started", 0 if ending is None else near_end)
    if not started:
        started = _read_last_row(content[:TAIL_BYTES], "started", 0)
    if started is not None and tail.rfind(b', "started": ') > tail.rfind(b', "ended": '):
        ending = None  # the run was resumed after that ending
    samples = _read_last_row(content, "samples", near_end)
    memory = _read_last_row(content, "memory", near_end)
    return RunHistory.of(filter(None, [started, samples, memory, ending]))


def _sample_losses(content: bytes | mmap.mmap) -> list[float]:
    """Return fewer than 2 * NUM_LOSS_SAMPLES losses for a sparkline, evenly spread over a history."""
    # A short history is read in full, and neighboring losses are averaged. A long history is read only at
    # about NUM_LOSS_SAMPLES positions, one loss at each.
    size = len(content)
    if size <= FULL_READ_BYTES:
        losses = [float(loss) for _, loss in LOSS.findall(content)]
    else:
        losses = []
        last_position = size - LOSS_SAMPLE_BYTES
        for position in range(0, last_position, max(1, last_position // NUM_LOSS_SAMPLES)):
            match = LOSS.search(content[position : position + LOSS_SAMPLE_BYTES])
            if match is not None:
                losses.append(float(match[2]))
    num_averaged = max(1, len(losses) // NUM_LOSS_SAMPLES)
    starts = range(0, len(losses), num_averaged)
    return [compute_mean(losses[start : start + num_averaged]) for start in starts]


def _find_newest_sample(run_history: RunHistory) -> str:
    """Return the file name of the newest step's sample of the first prompt; "" if there are none."""
    samples = [row.files for row in run_history.samples.values() if row.files]
    if not samples:
        return ""
    newest = samples[-1]
    return newest[min(newest)]


def _read_last_number(pattern: re.Pattern[bytes], tail: bytes) -> float | None:
    numbers = pattern.findall(tail)
    return float(numbers[-1]) if numbers else None


def find_doing(tail: bytes) -> str:
    """Return the last `doing` text of a history file, such as caching; "" if the run has continued since."""
    row = _read_last_row(tail, "doing", 0)
    position = tail.rfind(b', "doing": ')
    later = ("loss", "ended", "started", "samples", "saved", "validation")
    is_over = any(tail.rfind(f', "{key}": '.encode()) > position for key in later)
    return "" if row is None or is_over else str(row["doing"])


def _read_last_row(content: bytes | mmap.mmap, key: str, minimum: int) -> Row | None:
    """Return the last line with this key that begins at offset `minimum` or later; None without one."""
    position = content.rfind(f', "{key}": '.encode(), max(0, minimum))
    if position < 0:
        return None
    begin = content.rfind(b"\n", 0, position) + 1
    end = content.find(b"\n", position)
    return parse_row(content[begin : end + 1]) if end >= 0 else None


@dataclass
class OpenHistory:
    """The history of the run that a page shows; `refresh` reads only newly appended lines."""

    path: Path
    status: os.stat_result | None = None
    run_history: RunHistory = field(default_factory=RunHistory)
    _offset: int = 0

    def refresh(self) -> None:
        """Read the lines that were appended to the history of a training run since the last call.

        Raises OSError if the file cannot be read.
        """
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            was_replaced = self.status is None or self.status.st_ino != status.st_ino
            was_truncated = status.st_size < self._offset
            if was_replaced or was_truncated:
                self.run_history = RunHistory()
                self._offset = 0
            self.status = status
            file.seek(self._offset)
            for line in iter(lambda: file.readline(MAX_LINE_CHARACTERS), b""):
                if not line.endswith(b"\n"):
                    break  # the line is still being written
                self._offset += len(line)
                row = parse_row(line)
                if row is None:
                    continue
                if "session" in row:  # a new training session has overwritten the history
                    self.run_history = RunHistory()
                else:
                    self.run_history.add(row)


class ListedFolder(NamedTuple):
    """Content of a folder when it was last listed."""

    changed: int  # when the folder was changed, in nanoseconds
    folders: list[Path]
    histories: list[Path]
    configs: list[Path]


class ReadHistory(NamedTuple):
    """Summary of a history file, and the file's size and times when it was read."""

    version: tuple[int, int, int]  # modification time, size and inode
    run: RunSummary


class Runs:
    """Finds the runs below the root folders. Links are resolved; files outside the roots are ignored."""

    def __init__(self, folders: Collection[Path]) -> None:
        """Search for runs below `folders`, which may also be history files."""
        self.roots = [real_path(folder) for folder in folders]
        self._folders: dict[Path, ListedFolder] = {}
        self._histories: dict[str, ReadHistory] = {}
        self._open: dict[Path, OpenHistory] = {}
        self.lock = threading.RLock()  # protects everything that is cached here

    def list_all(self) -> list[RunSummary]:
        """Return all runs, the newest first."""
        with self.lock:
            histories: dict[str, ReadHistory] = {}
            for root in self.roots:
                for path in self._walk(root, MAX_DEPTH):
                    if str(path) not in histories:
                        with contextlib.suppress(OSError):
                            histories[str(path)] = self._read_history(path)
            self._histories = histories
            runs = [history.run for history in histories.values() if not self._is_superseded(history.run)]
            return sorted(runs, key=lambda run: -run.changed)

    def _is_superseded(self, run: RunSummary) -> bool:
        """Return whether a history covers only preparation, and its training run now has its own history."""
        if not run.name.endswith(BEFORE_TRAINING):
            return False
        training_path = history_path(run.history.parent, run.name.removesuffix(BEFORE_TRAINING))
        training = self._histories.get(str(training_path))
        return training is not None and training.run.changed >= run.changed

    def _read_history(self, path: Path) -> ReadHistory:
        """Return the summary of a history, which is read only if it has changed."""
        status = path.lstat()
        version = status.st_mtime_ns, status.st_size, status.st_ino
        cached = self._histories.get(str(path))
        if cached is not None and cached.version == version:
            return cached
        return ReadHistory(version, read_run_summary(path, status))

    def _walk(self, folder: Path, depth: int) -> Iterator[Path]:
        """Yield the history files in a folder and in its subfolders down to a depth."""
        try:
            changed = folder.stat().st_mtime_ns
            if folder.is_file():
                # a root may be a file: a history, or the configuration of a dataset
                if folder.suffix != CONFIG:
                    yield folder
                return
            # a folder is listed again only after it has changed
            content = self._folders.get(folder)
            if content is None or content.changed != changed:
                content = _list_folder(folder, changed)
                self._folders[folder] = content
        except OSError:
            return
        yield from content.histories
        if depth:
            for subfolder in content.folders:
                yield from self._walk(subfolder, depth - 1)

    def find(self, id: str) -> RunSummary | None:
        """Return the run with this id, read again; None if there is none."""
        with self.lock:
            paths = {history.run.id: path for path, history in self._histories.items()}
            if id not in paths:
                paths = {run.id: str(run.history) for run in self.list_all()}
            if id not in paths:
                return None
            path = paths[id]
            with contextlib.suppress(OSError):
                history = self._read_history(Path(path))
                self._histories[path] = history
                return history.run
        return None

    def open(self, run: RunSummary) -> OpenHistory:
        """Return the current content of a run's history. Raises OSError if it cannot be read."""
        with self.lock:
            open_history = self._open.pop(run.history, None) or OpenHistory(run.history)
            open_history.refresh()
            self._open[run.history] = open_history  # the most recently used last
            for path in [*self._open][:-MAX_OPEN]:
                del self._open[path]
            return open_history

    def configs(self) -> list[Path]:
        """Return the .toml files that the last `list_all` found below the roots."""
        with self.lock:
            configs = [root for root in self.roots if root.suffix == CONFIG]
            for content in self._folders.values():
                configs += content.configs
            return configs

    @property
    def root_folders(self) -> list[Path]:
        """Folders that the pages show: the given folders, and the folders of given history files."""
        return [root.parent if root.is_file() else root for root in self.roots]

    def find_top(self, path: Path) -> Path:
        """Return the root folder that contains, or is, a path. Raises OutputError if there is none."""
        real = real_path(path)
        for top in self.root_folders:
            if real.is_relative_to(real_path(top)):
                return top
        raise OutputError(f"{path} is not below the folders of this page")

    def is_inside(self, path: Path) -> bool:
        """Return whether a path is a file whose real path is below the folders."""
        return self.is_below(path) and path.is_file()

    def is_below(self, path: Path) -> bool:
        """Return whether a path exists and its real path is below the folders."""
        if all(is_on_foreign_share(path, top) for top in self.root_folders):
            return False
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            return False
        return any(real.is_relative_to(top) for top in self.root_folders)


MAX_OPEN = 8  # histories in memory


def _list_folder(folder: Path, changed: int) -> ListedFolder:
    """List runs, dataset files and folders in a folder; links are not followed."""
    content = ListedFolder(changed, folders=[], histories=[], configs=[])
    with os.scandir(folder) as entries:
        for entry in entries:
            is_file = entry.is_file(follow_symlinks=False)
            if is_file and entry.name.endswith(END):
                content.histories.append(Path(entry.path))
            elif is_file and entry.name.endswith(CONFIG):
                content.configs.append(Path(entry.path))
            elif entry.is_dir(follow_symlinks=False) and not _belongs_to_run(entry.name):
                content.folders.append(Path(entry.path))
    return content


def _belongs_to_run(name: str) -> bool:
    """Return whether a folder with this name is hidden, is a bin, or contains a run's samples or state."""
    return name.startswith(".") or name in (SAMPLES, BIN) or name.endswith("-state")
