"""Pages of trainings: a process of its own draws them, and may be later than the end of the training.

It loads its libraries anew, which takes twice as long as a tiny training. So the scripts that run inside the
test's process start none: their pages are drawn here, by the same function, when a test asks for them.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from tests.waiting import wait_for
from training.reports import drawing
from training.reports.drawing import PageProcess, is_page_current
from training.reports.history import BEFORE_TRAINING, END, history_name, history_path
from training.reports.sections import page_path


class Typed(NamedTuple):
    """What a page's process is told of its training."""

    folder: str  # in which it was typed
    script: str  # as it was typed


_UNDRAWN: dict[Path, Typed] = {}  # history -> its training, which has started no process


@contextlib.contextmanager
def pages_drawn_later() -> Iterator[None]:
    """Let trainings in this process note their pages instead of starting a process that draws them."""

    def note(_: PageProcess, history: Path) -> None:
        _UNDRAWN[history.absolute()] = Typed(str(Path.cwd()), sys.argv[0])

    def leave(_: PageProcess) -> None:
        return

    with patch.multiple(PageProcess, __init__=note, draw=leave, close=leave):
        yield


def find_run_page(output: Path, name: str = "x") -> Path:
    """Return the page of a training that has ended, once it shows all of it. output: its folder."""
    page, history = page_path(output, name), history_path(output, name)
    typed = _UNDRAWN.pop(history.absolute(), None)
    if typed is not None:
        _draw(history.absolute(), typed)
    wait_for(lambda: page.is_file() and is_page_current(history), lambda: f"no {page}")
    return page


def _draw(history: Path, typed: Typed) -> None:
    """Draw a page as its process does once it has nothing more to read: its training has ended."""
    with (
        Path(os.devnull).open(encoding="utf-8") as nothing,
        patch.object(sys, "stdin", nothing),
        patch.object(sys, "argv", [""]),
        patch("os.nice", lambda _: 0, create=True),
        contextlib.chdir(Path.cwd()),  # it goes to the folder of its training
    ):
        drawing.main([str(history), *typed])


def read_run_page(output: Path, name: str = "x") -> str:
    """Return the text of this page."""
    return find_run_page(output, name).read_text(encoding="utf-8")


def wait_for_run_pages(folder: Path) -> None:
    """Wait until all trainings below a folder have their pages."""
    for history in folder.rglob(f"*{END}"):
        if not history.name.endswith(f"{BEFORE_TRAINING}{END}"):  # `run` itself has no page
            find_run_page(history.parent, history_name(history))
