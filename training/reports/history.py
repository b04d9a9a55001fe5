"""Keep a run's reports as lines of a file next to its results, from which alone its page is made.

`OUTPUT_NAME-history.jsonl` has one JSON object per line: first the number of the run, then its settings,
steps, validations, samples, saved files, messages and its end as they happen. Lines are appended. A resumed
run drops the lines of steps after its state, which are trained again, and lines that cannot be read, such as
the last one of a killed run.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from modules.atomic_write import append_text, atomic_path, identify_machine, replace_surrogates
from modules.limits import MAX_LINE_CHARACTERS
from modules.text_files import require_regular_file
from protocols.families import HIGH_NOISE, LOW_NOISE
from training.reports.metric_charts import MAX_SHOWN, MetricChart, MetricTile

logger = logging.getLogger(__name__)

VERSION = 1
END = "-history.jsonl"
BEFORE_TRAINING = ".run"  # suffix of the run's name for the history of what `run` did before the training
MAX_BUFFERED_LINES = 2000  # lines in memory
MAX_STEPS = 10**15
LOSS = "validation/loss"
METRICS = "pairs"  # key of additional values of features in the line of a step; a historical name
AVERAGE = "-ema"  # in the name of a saved file: it contains the average of the weights
THIS_RUN = "This run, as it was started"  # title of the command that started a run
WORKFLOW = ".workflow.json"  # suffix of a ComfyUI workflow next to the files of a save; removed with them
# lines on memory, as the page names them
PREDICTED, HIGHEST = "a training step, predicted", "highest of the run with samples, measured"
SAMPLE_TEXTS = ("files", "prompts")  # keys of a line about samples; their values are by prompt number
# keys of lines about single steps, which `History` does not keep in memory
TRANSIENT_KEYS = {"loss", "doing"}
Row = dict[str, Any]
Points = dict[int, float | None]  # a curve: value by step; None: it was NaN or infinite
SHOWN = 50  # steps whose mean duration is shown next to the bar, in the box at the end and on pages


def find_workflow(folder: Path, saved: str) -> str:
    """Return the file name of the ComfyUI workflow that loads a saved file; "" if it does not exist.

    Args:
        folder: Folder of the saved file.
        saved: Name of the saved file. Files of the high-noise and low-noise transformers share a workflow.
    """
    stem = saved.removesuffix(".safetensors")
    stems = (stem, stem.removesuffix(f"_{LOW_NOISE}"), stem.removesuffix(f"_{HIGH_NOISE}"))
    names = (f"{shared}{WORKFLOW}" for shared in stems)
    return next((name for name in names if (folder / name).is_file()), "")


@dataclass(frozen=True)
class SampleRow:
    """Samples generated at one step: their files and prompts."""

    step: int
    step_label: str  # as in their names: 000020 at a step, e000001 at the end of an epoch
    files: Mapping[int, str]  # number of the prompt -> name of the file in the sample folder
    prompts: Mapping[int, str]
    strengths: Mapping[int, float] = field(default_factory=dict)  # of the LoRA, if not 1

    @property
    def files_as_trained(self) -> dict[int, str]:
        """Files of the samples at a strength of 1, which show what the saved file does."""
        return {index: name for index, name in self.files.items() if index not in self.strengths}


@dataclass(frozen=True)
class PageCommand:
    """A suggested command to run after training, written for bash and for PowerShell."""

    title: str
    bash: str
    powershell: str
    note: str = ""
    missing: str = ""  # words that the user has to replace; "": the command is complete

    @property
    def heading(self) -> str:
        """Return the command's title, with a note about values that the user must fill in."""
        return f"{self.title} (fill in {self.missing})" if self.missing else self.title


@dataclass(frozen=True)
class Start:
    """Description of a run and its process, recorded when the run starts."""

    model: str
    total_steps: int
    changed: Sequence[tuple[str, str]] = ()  # options that differ from their defaults
    unchanged: Sequence[tuple[str, str]] = ()
    listens: bool = False  # whether it watches for files that request samples or saves
    process: Mapping[str, Any] = field(default_factory=dict)  # see `describe_process`
    written_in: str = ""  # folder of the history, with links resolved; "" if an older version wrote the line
    working_folder: str = ""  # folder of the command; "" if an older version wrote the line
    # show additional values of features on the page
    charts: Sequence[MetricChart] = ()
    tiles: Sequence[MetricTile] = ()

    @classmethod
    def of(cls, values: Row) -> "Start":
        """Parse the line that a run writes at its start.

        Raises:
            ValueError, TypeError, LookupError: If this program did not write the line.
        """
        changed = _text_pairs(values["changed"])
        unchanged = _text_pairs(values["unchanged"])
        total_steps = int(values["total_steps"])
        listens = bool(values["listens"])
        if not 0 <= total_steps <= MAX_STEPS:
            raise ValueError("no run has so many steps")
        return cls(
            model=str(values["model"]),
            total_steps=total_steps,
            changed=changed,
            unchanged=unchanged,
            listens=listens,
            process=dict(values["process"]),
            written_in=str(values.get("written_in", "")),
            working_folder=str(values.get("working_folder", "")),
            charts=[MetricChart.of(chart) for chart in values.get("charts", ())[:MAX_SHOWN]],
            tiles=[MetricTile.of(tile) for tile in values.get("tiles", ())[:MAX_SHOWN]],
        )


@dataclass
class RunHistory:
    """Parsed content of a run's history file; repeated lines count once."""

    loss: Points = field(default_factory=dict)
    seconds: Points = field(default_factory=dict)  # duration of steps
    average: float | None = None  # mean of the losses of the last epoch; None: an older version wrote none
    left: float | None = None  # seconds to the end as of the last step, with samples, validations and saves
    doing: str = ""  # current work between two steps: `sample 1 of 2, step 140 of 300`
    rates: dict[str, Points] = field(default_factory=dict)
    experts: dict[str, Points] = field(default_factory=dict)  # losses of the experts by name
    metrics: dict[str, Points] = field(default_factory=dict)  # additional values of features by name
    skipped: dict[int, str] = field(default_factory=dict)  # steps that were not taken, with the reason
    validations_by_level: dict[str, Points] = field(default_factory=dict)  # validation losses by noise level
    validations: dict[int, float] = field(default_factory=dict)  # step -> loss
    samples: dict[tuple[int, str], SampleRow] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)  # name in the output folder -> step
    starts: dict[int, Start | None] = field(default_factory=dict)  # by the step; None: an older version's
    ending: tuple[str, str] | None = None  # how the run has ended, and its kind; None: it has not
    memory: list[tuple[str, str]] = field(default_factory=list)  # names and values
    commands: list[PageCommand] = field(default_factory=list)
    messages: list[tuple[int, str, str]] = field(default_factory=list)  # step, level, text
    notes: list[tuple[int, str]] = field(default_factory=list)  # of features: step, text

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "RunHistory":
        """Build the record from the rows of a history file."""
        run_history = cls()
        for row in rows:
            run_history.add(row)
        return run_history

    def add(self, row: Row) -> None:
        """Add a row, whose keys determine its kind. A start clears the ending of an earlier run."""
        step = row["step"]
        # a message does not change the current activity; any other row ends it
        self.doing = self.doing if "message" in row else str(row.get("doing", ""))
        if "loss" in row:
            self._add_step(step, row)
        elif "validation" in row:
            losses = row["validation"]
            for name, value in losses.items():
                loss = _finite_or_none(value)
                if name != LOSS:
                    self.validations_by_level.setdefault(name, {})[step] = loss
                elif loss is not None:
                    self.validations[step] = loss
        elif "samples" in row:
            self._add_samples(step, row)
        elif "saved" in row:
            self.saved[row["saved"]] = step
        elif "message" in row:
            self.messages.append((step, str(row["level"]), str(row["message"])))
        elif "note" in row:
            self.notes.append((step, str(row["note"])))
        elif "ended" in row:
            self.ending = str(row["ended"]), str(row["kind"])
        elif "memory" in row:
            self.memory = [(str(line[0]), str(line[-1])) for line in row["memory"]]
        elif "commands" in row:
            self.commands = [PageCommand(*map(str, command)) for command in row["commands"]]
        elif "doing" not in row:
            # Add a start; lines of older versions have no values that describe it
            values = row.get("started")
            self.starts[step] = Start.of(values) if isinstance(values, dict) else None
            self.ending = None

    def _add_samples(self, step: int, row: Row) -> None:
        step_label = str(row["samples"])
        files, prompts = (
            {int(index): str(text) for index, text in (row[key]).items()} for key in SAMPLE_TEXTS
        )
        strengths = {int(index): float(strength) for index, strength in row.get("strengths", {}).items()}
        self.samples[step, step_label] = SampleRow(step, step_label, files, prompts, strengths)

    def _add_step(self, step: int, row: Row) -> None:
        self.loss[step] = _finite_or_none(row["loss"])
        self.seconds[step] = _finite_or_none(row.get("seconds"))
        self.average = _finite_or_none(row.get("average"))
        self.left = _finite_or_none(row.get("left"))
        if row.get("skipped"):
            self.skipped[step] = str(row["skipped"])
        for name, rate in (row.get("rates") or {}).items():
            self.rates.setdefault(name, {})[step] = _finite_or_none(rate)
        for name, loss in (row.get("experts") or {}).items():
            self.experts.setdefault(name, {})[step] = _finite_or_none(loss)
        for name, number in (row.get(METRICS) or {}).items():
            self.metrics.setdefault(name, {})[step] = _finite_or_none(number)

    @property
    def start(self) -> "Start | None":
        """Description of the run's latest start; None if no valid one is recorded."""
        return next((start for start in reversed(self.starts.values()) if start is not None), None)

    @property
    def lowest_validation(self) -> "ValidationLoss | None":
        """The lowest validation loss; None before the first validation."""
        by_loss = [(loss, step) for step, loss in self.validations.items()]
        if not by_loss:
            return None
        loss, step = min(by_loss)
        return ValidationLoss(step, loss)

    def nearest_validation(self, step: int) -> "ValidationLoss | None":
        """Return the loss of the validation nearest to a step, the earlier of two equally near.

        The validation at step 0, before training, is returned for step 0 only.
        """
        steps = [measured for measured in self.validations if measured > 0 or step == 0]
        if not steps:
            return None
        nearest = min(steps, key=lambda measured: (abs(measured - step), measured))
        return ValidationLoss(nearest, self.validations[nearest])

    def measured_files(self, folder: Path) -> list["MeasuredFile"]:
        """Return the saved files that exist, each with the validation loss measured nearest to its step."""
        files = []
        for name, step in self.saved.items():
            is_measured = not self.is_average(name) and not self.is_embedding(name)
            validated = self.nearest_validation(step) if is_measured else None
            if validated is not None and (folder / name).exists():
                loss_step, loss = validated
                files.append(MeasuredFile(name, step, loss, loss_step))
        return files

    def best_file(self, folder: Path) -> str | None:
        """Return the saved file with the lowest validation loss among those that still exist."""
        best = select_lowest_loss(self.measured_files(folder))
        return None if best is None else best.name

    def usable_file(self, folder: Path, best: str | None = None) -> str | None:
        """Return the saved file to generate with: the best one, or the file of the highest step that exists.

        If several files have the highest step, the one with the shortest name is returned: the final file.

        Args:
            folder: Folder of the files.
            best: The best file by scores; None for the best one by validation loss, if that was measured.
        """
        if best is None and self.validations:
            best = self.best_file(folder)
        if best is not None:
            return best
        candidates = [
            (-step, len(name), name)
            for name, step in self.saved.items()
            if not self.is_average(name) and not self.is_embedding(name) and (folder / name).exists()
        ]
        if not candidates:
            return None
        _, _, newest_file = min(candidates)
        return newest_file

    def is_average(self, name: str) -> bool:
        """Return whether a saved file has averaged weights (EMA), whose validation loss is not measured."""
        # the ending of averages may be followed by the name of a transformer
        endings = re.finditer(re.escape(AVERAGE), name)
        return any(f"{name[: ending.start()]}{name[ending.end() :]}" in self.saved for ending in endings)

    def is_embedding(self, name: str) -> bool:
        """Return whether a saved file contains only a word's embedding, such as `x_mycat.safetensors`."""
        stem, dot, ending = name.rpartition(".")
        stems_without_word = [stem[: match.start()] for match in re.finditer("_", stem)]
        return any(f"{shorter}{dot}{ending}" in self.saved for shorter in stems_without_word)


class ValidationLoss(NamedTuple):
    """Validation loss measured at one step."""

    step: int
    loss: float


@dataclass(frozen=True)
class MeasuredFile:
    """A saved file and the validation loss measured nearest to its step."""

    name: str
    step: int
    loss: float
    loss_step: int  # where it was measured, nearest to the step


def select_lowest_loss(files: Iterable[MeasuredFile]) -> MeasuredFile | None:
    """Return the file with the lowest validation loss; None if there is none.

    Several files may share the loss of one validation. Ties are resolved in favor of the file saved nearest
    to that validation, then the later one, then the one with the shortest name.
    """
    return min(
        files,
        key=lambda file: (file.loss, abs(file.loss_step - file.step), -file.step, len(file.name), file.name),
        default=None,
    )


class History:
    """History of one run: lines about single steps are only on disk, all others in memory too."""

    def __init__(self, path: Path, session: int, step: int = 0, is_written: bool = True) -> None:
        """Open a history and keep its lines up to `step`, but none at step 0 or from another run.

        A file that cannot be read is reported and treated as missing.

        Args:
            path: Path of the file.
            session: Identifies the run among others of the same name.
            step: Current step of the run.
            is_written: Whether lines may be written; False for readers.
        """
        self.path, self.session, self.is_written = path, session, is_written
        self._buffered_lines: list[str] = []
        # the first write drops the lines on disk after this step; None: it has been done
        self._last_step_to_keep: int | None = step
        self.run_history = RunHistory()  # all lines except those about single steps
        try:
            for row in _read_lines(path, session, step):
                if not row.keys() & TRANSIENT_KEYS:
                    self.run_history.add(row)
        except OSError as error:
            logger.warning("%s cannot be read (%s): the page begins at step %d.", path, error.strerror, step)

    def add(self, step: int, **values: Any) -> None:
        """Record a line whose key, such as `loss` or `saved`, names its kind; it is written with later lines.

        Raises:
            OutputError: If MAX_BUFFERED_LINES are buffered and cannot be written. They are dropped.
        """
        row: Row = _to_storable({"step": step, **values})
        # lines about single steps and about the start are not needed in memory
        if not row.keys() & {*TRANSIENT_KEYS, "started"}:
            self.run_history.add(row)
        # bytes of a file name that are not UTF-8 become escapes such as \\udce9, which JSON can restore
        line = replace_surrogates(json.dumps(row, ensure_ascii=False)) + "\n"
        if self.is_written:
            self._buffered_lines.append(line)
        if len(self._buffered_lines) >= MAX_BUFFERED_LINES:
            try:
                self.flush()
            finally:
                self._buffered_lines.clear()

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps, in memory now and on disk with the next write.

        Raises:
            OSError, OutputError: If the file cannot be read or written.
        """
        if not self.is_written:
            return
        self.flush()
        self._last_step_to_keep = step
        self.run_history = RunHistory()
        for row in _read_lines(self.path, self.session, step):
            if not row.keys() & {*TRANSIENT_KEYS, "started"}:
                self.run_history.add(row)

    def flush(self) -> None:
        """Write the buffered lines.

        Raises:
            OutputError: If writing fails. The lines stay buffered.
        """
        if not self.is_written:
            return
        # the first write: lines of other runs, or of later steps, are dropped
        if self._last_step_to_keep is not None:
            with (
                atomic_path(self.path) as new_path,
                new_path.open("w", encoding="utf-8", newline="\n") as file,
            ):
                file.write(json.dumps({"session": self.session, "version": VERSION}) + "\n")
                for row in _read_lines(self.path, self.session, self._last_step_to_keep):
                    file.write(replace_surrogates(json.dumps(row, ensure_ascii=False)) + "\n")
            self._last_step_to_keep = None
        try:
            append_text(self.path, "".join(self._buffered_lines))
        except Exception:
            # the last line in the file may be incomplete: the next attempt starts on a new line
            # only the first waiting line (if any) gets one line break before it, however often it was tried
            self._buffered_lines[:1] = [f"\n{line.lstrip()}" for line in self._buffered_lines[:1]]
            raise
        self._buffered_lines.clear()


def history_path(folder: Path, name: str) -> Path:
    """Return the path of a run's history file.

    Args:
        folder: Value of --output_dir.
        name: Value of --output_name.
    """
    return folder / f"{name}{END}"


def history_name(path: Path) -> str:
    """Return the --output_name of the run to which a history file belongs."""
    return path.name.removesuffix(END)


def describe_process(number: int | None = None) -> dict[str, Any]:
    """Return the host name, process ID and start time, which identify a process.

    Args:
        number: Process ID; None for this process.

    Raises:
        psutil.NoSuchProcess: If the process has ended.
    """
    import psutil  # comes with accelerate

    process = psutil.Process(number)
    return {"machine": identify_machine(), "number": process.pid, "born": round(process.create_time())}


def read_session(path: Path) -> int | None:
    """Return the number of the run (session) stored in a history file; None without a file or a number."""
    try:
        require_regular_file(path)
        with path.open("rb") as file:
            row = parse_row(file.readline(MAX_LINE_CHARACTERS))
    except OSError:
        return None
    return None if row is None else row.get("session")


def read_history(path: Path, session: int) -> RunHistory:
    """Parse the history file of a run, ignoring lines from other sessions.

    Raises:
        OSError: If the file cannot be read.
    """
    return RunHistory.of(_read_lines(path, session))


def _read_lines(path: Path, session: int, step: int | None = None) -> Iterator[Row]:
    """Yield the lines of a run, up to `step` if given; none at step 0."""
    # Unreadable lines are skipped, with a warning if there are several: a killed process leaves only one.
    if step == 0 or not path.exists():  # at step 0 a run begins, and has no lines to keep
        return
    require_regular_file(path)
    is_current_session = False
    num_unreadable = 0
    for row in _parse_lines(path):
        if row is None:
            num_unreadable += 1
        elif "session" in row:
            is_current_session = row["session"] == session
        elif is_current_session and (step is None or row["step"] <= step):
            yield row
    if num_unreadable > 1:
        logger.warning("%s: %d lines cannot be read and are left out.", path, num_unreadable)


def _parse_lines(path: Path) -> Iterator[Row | None]:
    """Yield the parsed lines of a history file that are not empty; None for an unreadable one."""
    with path.open("rb") as file:
        # a line that is too long is read in pieces, which cannot be parsed: memory stays small
        while line := file.readline(MAX_LINE_CHARACTERS):
            if line.strip():
                yield parse_row(line)


def parse_row(line: bytes) -> Row | None:
    """Parse a line that `History` wrote; None if it is incomplete, or names a file in another folder."""
    try:
        row = json.loads(line.decode("utf-8"))
        is_complete = line.endswith(b"\n") and isinstance(row, dict)
        if not is_complete or not _has_valid_number(row) or _leads_out_of_folder(row):
            return None
        if "session" not in row:
            RunHistory.of([row])  # fails here, not in a reader of the run, if a user's edit broke the line
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
        return None
    return row


def _has_valid_number(row: Row) -> bool:
    """Return whether a row has the number of a run (session), as the first line, or a possible step."""
    number = row.get("session", row.get("step"))
    if type(number) is not int:
        return False
    return "step" not in row or 0 <= row["step"] <= MAX_STEPS


def _leads_out_of_folder(row: Row) -> bool:
    """Return whether a file name in a row has folders: names are later joined to the run's folder."""
    names = [row["saved"]] if "saved" in row else row.get("files", {}).values()
    return any(Path(name).name != name or "\\" in name for name in names)


def _text_pairs(pairs: Any) -> list[tuple[str, str]]:
    return [(str(first), str(second)) for first, second in pairs]


def _finite_or_none(value: Any) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _to_storable(value: Any) -> Any:
    """Replace NaN and infinite numbers with None for JSON, and round other numbers to 7 digits."""
    if isinstance(value, Mapping):
        return {name: _to_storable(item) for name, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
