"""Work in a process that is killed, as `kill -9` does it."""

import os
import signal
import time
from collections.abc import Callable

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork a process")


def run_and_kill(work: Callable[[Callable[[], None]], None], seconds: float) -> tuple[int, bool]:
    """Fork a process that works, and kill it after some seconds.

    work: is given what it calls after each thing that it may rely on. Returns how often it did, and whether
    the work was done before the kill.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(lambda: os.write(writing, b".") and None)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the work failed by itself"
    said = b""
    while chunk := os.read(reading, 1 << 16):
        said += chunk
    os.close(reading)
    return len(said), os.WIFEXITED(status)
