"""Memory of this process as Linux counts it."""

import re
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def is_known() -> bool:
    """Return whether this system reports it."""
    return CLEAR.exists()


def require_linux() -> None:
    """Exit if the benchmark cannot measure on this system."""
    if not is_known():
        raise SystemExit(f"this benchmark reads {STATUS} and runs on Linux only")


def peak() -> int:
    """Return the most bytes resident at once since the process began or since `start_of_peak`."""
    return memory("VmHWM")


def start_of_peak() -> int:
    """Reset the peak; return the bytes resident now."""
    CLEAR.write_text("5", encoding="ascii")  # 5: reset VmHWM, see proc(5)
    return memory("VmRSS")


def memory(name: str) -> int:
    """Return the bytes in a line of /proc/self/status, such as RssAnon."""
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024
