"""Memory of this process, as Linux counts it."""

import re
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def is_known() -> bool:
    """Whether this system tells it."""
    return CLEAR.exists()


def require_linux() -> None:
    """End a benchmark that cannot measure here."""
    if not is_known():
        raise SystemExit(f"this benchmark reads {STATUS} and runs on Linux only")


def peak() -> int:
    """Bytes that were resident at once, at most, since the process began or `start_of_peak`."""
    return memory("VmHWM")


def start_of_peak() -> int:
    """Forget the peak so far; returns the bytes that are resident now."""
    CLEAR.write_text("5", encoding="ascii")  # 5: forget VmHWM, see proc(5)
    return memory("VmRSS")


def memory(name: str) -> int:
    """Bytes under that name of /proc/self/status, such as RssAnon."""
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024
