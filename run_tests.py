"""Set up the test environment, then run the linter, the type checker and the tests.

    python run_tests.py             everything that runs in minutes (what CI runs)
    python run_tests.py -m slow     the slow tests
    python run_tests.py tests/wan   one folder

Further arguments go to pytest.
"""

import os
import subprocess
import sys
from pathlib import Path

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.environment import ROOT, prepare_environment

# the models are tiny: workers share the cores better than threads
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def main() -> None:
    python = prepare_environment("test")
    chosen = sys.argv[1:]
    checks = [] if chosen else [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]]
    workers = (
        []
        if any(argument.startswith("-n") for argument in chosen)
        else ["-n", str(min(os.cpu_count() or 1, 8))]
    )
    failed = [
        " ".join(command) for command in [*checks, ["pytest", *workers, *chosen]] if _run(python, command)
    ]
    if failed:
        print(f"Failed: {'; '.join(failed)}")
        raise SystemExit(1)


def _run(python: Path, command: list[str]) -> int:
    print(f"\n== {' '.join(command)}", flush=True)
    environment = {**os.environ, **THREADS, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([str(python), "-m", *command], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    command_line(main, needs_packages=False)
