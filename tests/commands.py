"""Run the project's scripts as users do, from any folder."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUIET = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUTF8": "1",
    "ACCELERATE_USE_CPU": "true",
}


def run_script(
    script: str,
    *arguments: object,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a root script in a process of its own; with `check` a failure shows its output."""
    return run_python(ROOT / script, *arguments, folder=folder, environment=environment, check=check)


def run_python(
    *arguments: object,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run this Python with arguments."""
    return run_program(sys.executable, *arguments, folder=folder, environment=environment, check=check)


def run_program(
    program: str | Path,
    *arguments: object,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run any program with arguments."""
    done = subprocess.run(
        [str(program), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **QUIET, **(environment or {})},
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=600,
    )
    if check:
        assert done.returncode == 0, (
            f"{arguments[0]} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done


def assert_user_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The program ended with code 1 or 2, no traceback, and a message that holds all the words."""
    assert done.returncode in {1, 2}, f"exit code {done.returncode}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    for word in words:
        assert word in done.stderr, f"{word!r} is not in:\n{done.stderr[-3000:]}"
