"""Bound the memory that this process may take, while it runs what a file of somebody else says."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_STATUS = Path("/proc/self/status")  # of Linux


@contextlib.contextmanager
def limited_memory(more_bytes: int | None) -> Iterator[None]:
    """Let this process take at most so many bytes more; then what asks for memory fails instead.

    On Linux alone: other systems cannot bound it. None: no bound.
    """
    held = _read_held()
    if held is None or more_bytes is None:
        yield
        return
    import resource  # not on Windows

    default, most = resource.getrlimit(resource.RLIMIT_DATA)
    bound = held + more_bytes
    for limit in (default, most):
        if limit != resource.RLIM_INFINITY:
            bound = min(bound, limit)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (default, most))


def _read_held() -> int | None:
    """Return the bytes that this process has asked for and may write; None where that is not known."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = re.search(r"VmData:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024
