"""Write a program's progress to a small file for the program that started it, such as `run`.

The environment variable `PROGRESS` names the file; without it nothing is written. It is replaced at most once
a second.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

from modules.atomic_write import write_text
from modules.errors import OutputError
from modules.installation import PROGRESS
from modules.text_files import parse_json, read_text

EVERY_SECONDS = 1.0
MAX_BYTES = 1000


class NotedProgress(NamedTuple):
    """Progress of a loop, as written to a file for other processes."""

    done: float
    total: float | None  # None if unknown
    unit: str  # "B" for bytes, else the name of an item


class ProgressFile:
    """Writes the progress of successive loops to the file named by the variable `PROGRESS`, if it is set."""

    def __init__(self) -> None:
        name = os.environ.get(PROGRESS)
        self.path = Path(name) if name else None
        self._written = -EVERY_SECONDS

    def note(self, done: float, total: float | None, unit: str) -> None:
        """Write the progress, at most once a second except at the end."""
        now = time.monotonic()
        if self.path is None or (now - self._written < EVERY_SECONDS and done != total):
            return
        self._written = now
        with contextlib.suppress(OSError, OutputError):  # a missing progress display must not end the work
            write_text(self.path, json.dumps([done, total, unit]))


def read_progress(path: Path) -> NotedProgress | None:
    """Return the progress that a `ProgressFile` has written; None if there is none."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        done, total, unit = parse_json(read_text(path, MAX_BYTES))
        return NotedProgress(float(done), None if total is None else float(total), str(unit))
    return None
