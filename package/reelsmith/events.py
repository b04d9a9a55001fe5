"""The events of a running command: lines that it prints, and what its training writes into its history."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.reports.history import LOSS, history_path, parse_row
from training.reports.sections import SAMPLES


@dataclass(frozen=True)
class LineEvent:
    """A line that the command has printed."""

    text: str


@dataclass(frozen=True)
class StepEvent:
    """An optimizer step. A loss is None if it was NaN or infinite."""

    step: int
    total_steps: int
    loss: float | None
    average_loss: float | None  # of the last losses, at most an epoch's
    learning_rates: Mapping[str, float]
    seconds: float | None  # that the step took
    seconds_left: float | None  # to the end of the run


@dataclass(frozen=True)
class ValidationEvent:
    """The validation losses after a step."""

    step: int
    loss: float | None
    losses: Mapping[str, float | None]  # with those of single noise levels, by name


@dataclass(frozen=True)
class SampleEvent:
    """A sample image or clip that a training run has generated after a step."""

    step: int
    prompt: str
    path: Path


@dataclass(frozen=True)
class SavedEvent:
    """A file with trained weights, saved after a step."""

    step: int
    path: Path


Event = LineEvent | StepEvent | ValidationEvent | SampleEvent | SavedEvent


class PrintedLines:
    """Reads the lines that a process appends to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0

    def read(self, is_over: bool = False) -> Iterator[LineEvent]:
        """Yield the lines since the last call. An unfinished last line comes only if `is_over`."""
        with self.path.open("rb") as file:
            file.seek(self._position)
            content = file.read()
        end = len(content) if is_over else content.rfind(b"\n") + 1
        self._position += end
        for line in content[:end].decode("utf-8", "replace").splitlines():
            yield LineEvent(line)


class HistoryEvents:
    """Reads the events of one training run from the history file that it writes.

    Create this reader before the training run starts. The file may contain rows of earlier runs, and the new
    run rewrites it, so its rows are the ones after a start entry that the file did not contain before.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Remember the start entries of an earlier run in the history file, to read only new events.

        Args:
            folder: Value of --output_dir.
            name: Value of --output_name.
        """
        self.folder = folder
        self.path = history_path(folder, name)
        self._inode = 0  # inode number of the file that was read last: the run replaces the file once
        self._position = 0  # number of its bytes that were read
        self._old_start_lines = {line for line in self._read_lines() if _parse_start_entry(line) is not None}
        # `read` begins with the first line again: the replaced file also contains the old rows
        self._inode = self._position = 0
        self._has_started = False
        self._total_steps = 0

    def read(self) -> Iterator[Event]:
        """Yield the events since the last call."""
        for line in self._read_lines():
            start_entry = _parse_start_entry(line)
            if start_entry is not None and line not in self._old_start_lines:
                self._has_started = True
                self._total_steps = int(start_entry.get("total_steps", 0))
            row = parse_row(line) if self._has_started else None
            if row is not None:
                yield from self._read_row(row)

    def _read_lines(self) -> list[bytes]:
        """Return the complete lines since the last call; all of them if the file was replaced."""
        try:
            with self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._position = inode, 0
                file.seek(self._position)
                content = file.read()
        except OSError:  # there is none yet, or it is being replaced
            return []
        end = content.rfind(b"\n") + 1
        self._position += end
        return content[:end].splitlines(keepends=True)

    def _read_row(self, row: Mapping[str, Any]) -> Iterator[Event]:
        """Yield the events in a row of the run's history: a step, a validation, samples or a saved file."""
        step = row["step"]
        if "loss" in row:
            yield StepEvent(
                step=step,
                total_steps=self._total_steps,
                loss=row["loss"],
                average_loss=row.get("average"),
                learning_rates=row.get("rates") or {},
                seconds=row.get("seconds"),
                seconds_left=row.get("left"),
            )
        elif "validation" in row:
            losses = row["validation"]
            yield ValidationEvent(step, losses.get(LOSS), losses)
        elif "samples" in row:
            for index, name in row["files"].items():
                prompt = str(row["prompts"].get(index, ""))
                yield SampleEvent(step, prompt, self.folder / SAMPLES / name)
        elif "saved" in row:
            yield SavedEvent(step, self.folder / row["saved"])


def _parse_start_entry(line: bytes) -> dict[str, Any] | None:
    """Return the `start` entry of a history line (JSON); None for other lines."""
    if b'"started"' not in line:
        return None
    try:
        started = json.loads(line).get("started")
    except (ValueError, AttributeError):
        return None
    return started if isinstance(started, dict) else None
