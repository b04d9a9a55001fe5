"""Keep what a run has reported in a list of lines beside its files, so that a resumed run shows all of it.

`OUTPUT_NAME-history.jsonl` has one JSON object a line: first the run it belongs to, then steps, validations,
samples and saved files as they happen. Lines are appended. A resumed run drops those of steps beyond its
state, which are trained again, and those that cannot be read, such as the last one of a killed run.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from modules.atomic_write import append_text, atomic_path
from modules.text_files import require_regular_file
from training.reports.curves import BinnedCurve

logger = logging.getLogger(__name__)

VERSION = 1
LONGEST_LINE = 1 << 20  # bytes; lines of ours have some hundred
MOST_WAITING = 2000  # lines in memory
LOSS = "validation/loss"
Row = dict[str, Any]


@dataclass(frozen=True)
class SampleRow:
    """Hold the samples of one time."""

    step: int
    mark: str  # as in their names: 000020 at a step, e000001 at the end of an epoch
    files: Mapping[int, str]  # number of the prompt -> name of the file in the sample folder
    prompts: Mapping[int, str]


@dataclass
class History:
    """Hold the history of one run, in memory and on disk. `session` tells it from others of the same name."""

    path: Path
    session: int
    loss: BinnedCurve = field(default_factory=BinnedCurve)
    rates: dict[str, BinnedCurve] = field(default_factory=dict)
    experts: dict[str, BinnedCurve] = field(default_factory=dict)  # losses of the experts by name
    seconds: BinnedCurve = field(default_factory=BinnedCurve)  # of steps
    bands: dict[str, BinnedCurve] = field(default_factory=dict)  # validation losses by noise level
    validations: dict[int, float] = field(default_factory=dict)  # step -> loss
    samples: dict[tuple[int, str], SampleRow] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)  # name in the output folder -> step
    starts: list[int] = field(default_factory=list)  # steps from which the run was started or resumed
    _waiting: list[str] = field(default_factory=list)
    _keeps_up_to: int | None = None  # the last step of the lines on disk that are kept; None: all are

    def note_step(
        self,
        step: int,
        loss: float,
        rates: Mapping[str, float],
        seconds: float | None = None,
        by_expert: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Add a step. by_expert: see `StepReport`."""
        row: Row = {"step": step, "loss": loss, "rates": dict(rates), "seconds": seconds}
        self._add({**row, "experts": dict(by_expert)} if by_expert else row)

    def note_validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Add the losses of a validation."""
        self._add({"step": step, "validation": dict(losses)})

    def note_samples(self, row: SampleRow) -> None:
        """Add samples; they replace those of the same step and mark."""
        files = {str(index): name for index, name in row.files.items()}
        prompts = {str(index): text for index, text in row.prompts.items()}
        self._add({"step": row.step, "samples": row.mark, "files": files, "prompts": prompts})

    def note_saved(self, step: int, name: str) -> None:
        """Add a file that was saved."""
        self._add({"step": step, "saved": name})

    def note_start(self, step: int) -> None:
        """Add that the run was started or resumed at a step."""
        self._add({"step": step, "started": True})

    def flush(self) -> None:
        """Write what is waiting. Raises OutputError if that fails; it then keeps waiting."""
        if self._keeps_up_to is not None:
            self._begin_file(self._keeps_up_to)
            self._keeps_up_to = None
        append_text(self.path, "".join(self._waiting))
        self._waiting.clear()

    @property
    def is_long(self) -> bool:
        """Return whether it is time to flush."""
        return len(self._waiting) >= MOST_WAITING

    def drop_waiting(self) -> None:
        """Forget lines that cannot be written; the curves in memory keep them."""
        self._waiting.clear()

    def _add(self, row: Row) -> None:
        self._waiting.append(json.dumps(_finite(row), ensure_ascii=False) + "\n")
        _take(self, row)

    def _begin_file(self, step: int) -> None:
        """Write the file anew with its first line and what is kept of the earlier one."""
        with atomic_path(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({"session": self.session, "version": VERSION}) + "\n")
            for row in _rows(self.path, self.session, step):
                file.write(json.dumps(_finite(row), ensure_ascii=False) + "\n")


def history_path(folder: Path, name: str) -> Path:
    """Return the file of the history of a run. folder, name: --output_dir, --output_name."""
    return folder / f"{name}-history.jsonl"


def read_session(path: Path) -> int | None:
    """Return which run a history is of; None if there is none, or if it does not tell."""
    try:
        require_regular_file(path)
        with path.open("rb") as file:
            row = _parse(file.readline(LONGEST_LINE))
    except OSError:
        return None
    session = None if row is None else row.get("session")
    return session if isinstance(session, int) else None


def open_history(path: Path, session: int, step: int) -> History:
    """Return the history of a run that stands at `step`: empty at 0, and if the file is of another run.

    The file is only read. A file that cannot be read is reported and counts as none.
    """
    history = History(path, session, _keeps_up_to=step)
    try:
        broken = [0]
        for row in _rows(path, session, step, broken):
            _take(history, row)
        if broken[0] > 1:  # one is what a kill leaves
            logger.warning("%s: %d lines cannot be read and are left out.", path, broken[0])
    except OSError as error:
        logger.warning("%s cannot be read (%s): the page begins at step %d.", path, error.strerror, step)
    return history


def _rows(path: Path, session: int, step: int, broken: list[int] | None = None) -> Iterator[Row]:
    """Yield the lines of a run up to a step; none if it stands at its beginning.

    broken: counts lines that cannot be read. Raises OSError if the file cannot be read.
    """
    if step == 0 or not path.exists():
        return
    require_regular_file(path)
    with path.open("rb") as file:
        is_ours = False
        while line := file.readline(LONGEST_LINE):
            row = _parse(line)
            if row is not None and "session" in row:
                is_ours = row["session"] == session
            elif row is None or not _is_sound(row):
                if broken is not None:
                    broken[0] += 1
            elif is_ours and row["step"] <= step:
                yield row


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return row if isinstance(row, dict) and line.endswith(b"\n") else None


def _is_sound(row: Row) -> bool:
    """Return whether a line is one that `History` writes, whatever else is in it."""
    step = row.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 1 << 53:
        return False
    if "loss" in row:
        tables = [row.get("rates", {}), row.get("experts", {})]
        are_numbers = _is_number(row["loss"]) and _is_number(row.get("seconds"))
        return are_numbers and all(_is_table(table, _is_number) for table in tables)
    if "validation" in row:
        return _is_table(row["validation"], _is_number)
    if "samples" in row:
        is_sound = _is_table(row.get("files"), _is_file, True) and _is_table(
            row.get("prompts"), _is_text, True
        )
        return isinstance(row["samples"], str) and is_sound
    return _is_file(row.get("saved")) or row.get("started") is True


def _is_number(value: Any) -> bool:
    return value is None or (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_file(value: Any) -> bool:
    """Return whether it is the name of a file in a folder, not a path to somewhere else."""
    return isinstance(value, str) and "\0" not in value and Path(value).name == value


def _is_table(table: Any, is_value: Any, is_numbered: bool = False) -> bool:
    return isinstance(table, dict) and all(
        is_value(value) and (not is_numbered or (name.isascii() and name.isdigit() and len(name) < 10))
        for name, value in table.items()
    )


def _take(history: History, row: Row) -> None:
    """Add a line to the curves and tables in memory."""
    step = row["step"]
    if "loss" in row:
        history.loss.add(step, row["loss"])
        history.seconds.add(step, row.get("seconds"))
        for name, rate in row.get("rates", {}).items():
            history.rates.setdefault(name, BinnedCurve()).add(step, rate)
        for name, loss in row.get("experts", {}).items():
            history.experts.setdefault(name, BinnedCurve()).add(step, loss)
    elif "validation" in row:
        for name, loss in row["validation"].items():
            if name != LOSS:
                history.bands.setdefault(name, BinnedCurve()).add(step, loss)
            elif loss is not None and math.isfinite(loss):
                history.validations[step] = loss
    elif "samples" in row:
        files, prompts = (
            {int(index): text for index, text in row[name].items()} for name in ("files", "prompts")
        )
        history.samples[step, row["samples"]] = SampleRow(step, row["samples"], files, prompts)
    elif "saved" in row:
        history.saved[row["saved"]] = step
    else:
        history.starts.append(step)


def _finite(value: Any) -> Any:
    """Return the value with NaN and infinite numbers as None, which JSON can hold, and others shortened."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
