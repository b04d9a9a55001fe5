"""Work in a process that is killed, as `kill -9` does it."""

import contextlib
import math
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from modules import atomic_write

KILLED = 9
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork a process")


def run_and_kill(
    work: Callable[[Callable[[], None]], None], seconds: float, after: int = 0
) -> tuple[int, bool]:
    """Fork a process that works, and kill it after some seconds unless it is done.

    The seconds count from when the process has done the first things, so that a slow machine does them too.

    Args:
        work: Is given what it calls after each thing that it may rely on.
        seconds: How long it works on.
        after: How many of those things come first.

    Returns:
        How many of those things it did, and whether the work was done before the kill.
    """
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(lambda: os.write(writing, b".") and None)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    count, deadline, ended, status = 0, math.inf, 0, 0
    while not ended and time.monotonic() < deadline:
        time.sleep(0.002)
        count += _count_said(reading)
        if count >= after:
            deadline = min(deadline, time.monotonic() + seconds)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the work failed by itself"
    count += _count_said(reading)
    os.close(reading)
    return count, os.WIFEXITED(status)


def _count_said(reading: int) -> int:
    """Return how many bytes lie in a pipe, and take them."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while chunk := os.read(reading, 1 << 16):
            count += len(chunk)
    return count


RENAMES = ((os, "replace"), (atomic_write, "replace_file"), (Path, "rename"), (Path, "unlink"))


def run_to_step(work: Callable[[], None], step: int) -> bool:
    """Fork a process that works, and end it before it gives or takes away a file's name for the nth time.

    Returns whether the work was done before.
    """
    child = os.fork()
    if child == 0:
        code, left = 1, [step]
        try:
            with contextlib.ExitStack() as patches:
                for owner, name in RENAMES:
                    patches.enter_context(patch.object(owner, name, _counted(getattr(owner, name), left)))
                work()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), "the work failed by itself"
    return code == 0


def _counted(function: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def counted(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os._exit(KILLED)
        return function(*arguments, **options)

    return counted
