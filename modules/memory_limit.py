"""Limit the memory of this process while it processes an untrusted file."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_STATUS = Path("/proc/self/status")  # exists only on Linux


@contextlib.contextmanager
def limited_memory(more_bytes: int | None) -> Iterator[None]:
    """Let this process allocate at most `more_bytes` more memory in the block; None sets no limit.

    Allocations beyond the limit fail. Only Linux can enforce it; elsewhere nothing is limited.
    """
    used = _read_held()
    if used is None or more_bytes is None:
        yield
        return
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = used + more_bytes
    for limit in (soft, hard):  # limits that apply already are not raised
        if limit != resource.RLIM_INFINITY:
            bound = min(bound, limit)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _read_held() -> int | None:
    """Return how many bytes of writable memory this process has allocated; None if unknown."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        match = re.search(r"VmData:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
    except OSError:
        return None
    return None if match is None else int(match[1]) * 1024
