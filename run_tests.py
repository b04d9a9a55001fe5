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
from modules.parser import Parser

# the models are tiny: workers share the cores better than threads
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# Settings of torch's libraries that compute as other processors do: what was recorded is to be met there too.
# Networks are compared, a minute of work for each setting; `-m recorded` runs all such tests.
OTHER_PROCESSORS = ({"MKL_CBWR": "COMPATIBLE"}, {"ATEN_CPU_CAPABILITY": "default"})
NETWORKS = ("wan", "hunyuan_model", "frame_pack", "flux", "lumina", "hunyuan_image", "encoders", "networks")
RECORDED = ["-m", "recorded and not slow and not gpu", *(f"tests/{room}" for room in NETWORKS)]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("arguments", nargs="*", help="of pytest: folders, files and options such as -m slow")
    parser.parse_known_args()  # --help does nothing else
    python = prepare_environment("test")
    chosen = sys.argv[1:]
    checks = [] if chosen else [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]]
    workers = (
        []
        if any(argument.startswith("-n") for argument in chosen)
        else ["-n", str(min(os.cpu_count() or 1, 8))]
    )
    runs = [(command, {}) for command in [*checks, ["pytest", *workers, *chosen]]]
    if not chosen:
        runs += [(["pytest", *workers, *RECORDED], setting) for setting in OTHER_PROCESSORS]
    failed = [
        " ".join([*map("=".join, setting.items()), *command])
        for command, setting in runs
        if _run(python, command, setting)
    ]
    if failed:
        print(f"Failed: {'; '.join(failed)}")
        raise SystemExit(1)


def _run(python: Path, command: list[str], setting: dict[str, str]) -> int:
    print(f"\n== {' '.join([*map('='.join, setting.items()), *command])}", flush=True)
    environment = {**os.environ, **THREADS, **setting, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([str(python), "-m", *command], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    command_line(main, needs_packages=False)
