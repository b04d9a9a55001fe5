"""Run a process for a row or a file of tests, and end it together with everything that it has started."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

Children = list[subprocess.Popen[bytes]]


def run_child_process(
    command: Sequence[str],
    seconds: float,
    output: IO[bytes],
    errors: IO[bytes] | int = subprocess.STDOUT,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    children: Children | None = None,
) -> int | None:
    """Return a command's exit code; None if it was ended after `seconds`.

    It is ended with everything that it has started, such as the workers of torch's compiler, also if this
    process is interrupted. Its output goes to files: a pipe would stay open as long as one of its workers
    lives. `children` holds the process while it runs.
    """
    child = subprocess.Popen(
        command,
        stdout=output,
        stderr=errors,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )
    running = [] if children is None else children
    running.append(child)
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_with_children(child)
        running.remove(child)


def end_with_children(child: subprocess.Popen[bytes]) -> None:
    """End a process and everything that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended
        if sys.platform == "win32":
            child.kill()
        else:
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()
