"""Memory of this process as Linux counts it."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def is_known() -> bool:
    """Return whether this system reports it."""
    return CLEAR.exists()


def require_linux() -> None:
    """Exit if the benchmark cannot measure on this system."""
    if not is_known():
        raise SystemExit(f"this benchmark reads {STATUS} and runs on Linux only")


def peak() -> int:
    """Return the peak of resident bytes since the process began or since `start_of_peak`."""
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


def compare_peaks(names: Sequence[str], folder: Path, what: str, bar: float, rounds: int = 1) -> float:
    """Print the peaks of a baseline and of ours; return the ratio of ours to it, 0 if not known.

    Each is a run of this benchmark with `--child NAME FOLDER`, which prints a number of bytes last.

    Args:
        names: Of the baseline and of ours.
        folder: Folder of the models.
        what: What is measured, for the line that is printed.
        bar: Aim for the ratio.
        rounds: Number of runs; the peak is their median.
    """
    if not is_known():
        print("peaks: only Linux tells them")
        return 0.0
    baseline, ours = (median(run_child(name, folder) for _ in range(rounds)) for name in names)
    shown = ", ".join(
        f"{name} {peak / 1e6:.0f} MB" for name, peak in zip(names, (baseline, ours), strict=True)
    )
    print(f"{what}: {shown}; ratio {ours / baseline:.3f}, bar {bar}")
    return ours / baseline


def run_child(name: str, folder: Path) -> int:
    """Run this benchmark again as a child, and return the bytes that it prints."""
    command = [sys.executable, *sys.argv, "--child", name, str(folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    size_bytes: int = json.loads(lines[-1])
    return size_bytes
