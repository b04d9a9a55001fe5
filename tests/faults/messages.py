"""Run scripts inside the test's process, where they start in no time, and judge how they end."""

import contextlib
import io
import logging
import re
import runpy
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState

from tests.commands import QUIET, ROOT, typed_there
from tests.run_pages import pages_drawn_later

ERROR = re.compile(r"^(?:\w+Error: |.*\.py: error: )")
# what a message tells the user to do begins with one of these
REMEDIES = (
    "Pass|Give|Omit|Add|Use|Download|Copy|Fetch|Mend|Make|Resume|Run|Free|Cache|Update|Lower|Remove|Write|Set|Name|Leave|Choose"
    "|Did you mean|Drop|Change|Convert|Rename|Move|Start|Save|Put|Correct|Fix|Train"
)


def run_here(
    script: str, *arguments: object, folder: Path, printed: io.StringIO | None = None
) -> tuple[int, str]:
    """Run a root script as if it were a program of its own. printed: takes its standard output.

    `tests.run_pages` draws the page of a training; with --on_end, which hands it on, its process does.
    Returns its exit code and all that it wrote to standard error.
    """
    said = io.StringIO()
    root = logging.getLogger()
    handler = logging.StreamHandler(said)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    level, threads, interrupted = root.level, torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    torch.set_num_threads(1)  # as QUIET has it for programs
    code: Any = 0
    try:
        with (
            patch.dict("os.environ", QUIET),
            patch.object(sys, "argv", [script, *map(str, arguments)]),
            contextlib.chdir(folder),
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(printed or io.StringIO()),
            contextlib.nullcontext() if "--on_end" in arguments else pages_drawn_later(),
        ):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        torch.set_num_threads(threads)
        signal.signal(signal.SIGINT, interrupted)  # a program that ends takes Ctrl-C away from Python
    assert code is None or isinstance(code, int), code
    return code or 0, typed_there(said.getvalue())


def succeed_here(script: str, *arguments: object, folder: Path) -> str:
    """The same for a command that has to succeed, training included.

    Returns what it wrote to standard error.
    """
    # accelerate keeps its precision for the life of a process
    AcceleratorState._reset_state(reset_partial_state=True)
    code, said = run_here(script, *arguments, folder=folder)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert code == 0, said[-4000:]
    return said


def assert_one_message(code: int, said: str, *words: object, remedy: bool = True) -> str:
    """The program ended with 1 or 2, no traceback, and one message. Returns it.

    words: what it holds. remedy: it has to say what to do.
    """
    assert code in {1, 2}, f"exit code {code}\n{said[-3000:]}"
    assert "Traceback" not in said, said[-4000:]
    lines = said.splitlines()
    starts = [index for index, line in enumerate(lines) if ERROR.match(line) or line.startswith("ERROR: ")]
    assert len(starts) == 1, f"{len(starts)} messages\n{said[-3000:]}"
    message = "\n".join(lines[starts[0] :])
    for word in words:
        assert str(word) in message, f"{word} is not in:\n{message}"
    says_what_to_do = re.search(rf"\b({REMEDIES})\b", message, re.IGNORECASE)
    assert says_what_to_do or not remedy, f"what shall the user do?\n{message}"
    return message
