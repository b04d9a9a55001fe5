"""Set up the test environment, then run the linter, the type checker and the tests.

    python run_tests.py             what CI runs, in a clone (.ci/run): at most 15 minutes on two cores
    python run_tests.py --fast      quick tests alone, and the whole way of Wan: at most 4 minutes
    python run_tests.py --all       slow tests too
    python run_tests.py tests/wan   one folder

Tests that compare with recorded numbers run again with the arithmetic of other processors: of old ones, and
with AVX-512 if this processor has it; without --all, those of rooms that the last 30 commits have changed.
They run once more with the Python that the environment variable REELSMITH_SECOND_PYTHON names, or that of
.venv-second: an environment with another torch, made by you.
Tests that failed while others ran run once more, alone: what passes then is named and does not fail the run.
Further arguments go to pytest.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.environment import prepare_environment
from modules.errors import UserError
from modules.installation import ROOT
from modules.parser import Parser

# the models are tiny: workers share the cores better than threads
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# Settings of torch's libraries that compute as other processors do: what was recorded is to be met there too.
# Each with the flags of /proc/cpuinfo without which this processor cannot do so.
PROCESSORS: tuple[tuple[dict[str, str], str], ...] = (
    ({"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"}, ""),
    ({"ATEN_CPU_CAPABILITY": "avx512"}, "avx512f avx512bw avx512dq avx512vl"),
)
# Layers and networks are compared, a minute of work each time; `-m recorded` runs all such tests.
COMPARED = (
    "modules",
    "wan",
    "hunyuan_model",
    "frame_pack",
    "flux",
    "lumina",
    "hunyuan_image",
    "encoders",
    "networks",
)
RECORDED = ["-m", "recorded and not slow and not gpu"]
NUM_COMMITS = 30  # a push has fewer, so that no changed room is left out
SECOND = "REELSMITH_SECOND_PYTHON"  # names the Python of an environment with another torch
TYPES = ["mypy"]  # minutes the first time
TIERS = {"--fast": ["-m", "fast"], "--all": ["-m", ""]}
MAX_SECONDS = 480  # of the processor, for --fast
TESTS_FAILED = 1  # pytest's code; others mean that it could not run them
# Python ends with code 1 too if pytest itself raises, as on a full disk: tests that did not run would pass.
PYTEST = "\n".join(
    (
        "import os, sys, traceback, pytest",
        # as `python -m` does: `python -c` finds modules in whatever folder a test goes to
        "sys.path[0] = os.getcwd()",
        "try: code = pytest.main()",
        "except BaseException: traceback.print_exc(); sys.stderr.flush(); os._exit(3)",
        "sys.exit(code)",
    )
)
AGAIN = "--last-failed"
TOO_LONG = "`python -m pytest --measure-tests -m fast -n 2` finds those that are long now"


@dataclass(frozen=True)
class Check:
    """A command of one of the environments, such as pytest with its arguments."""

    python: Path
    command: list[str]
    settings: dict[str, str] = field(default_factory=dict)  # of the environment: one of PROCESSORS


def main() -> None:
    """Run the linter, the type checker and the tests; exit with 1 if any of them fails."""
    parser = Parser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="run tests of less than 0.15 seconds each")
    parser.add_argument("--all", action="store_true", help="run slow tests too")
    parser.add_argument("arguments", nargs="*", help="of pytest: folders, files and options such as -k vae")
    args, _ = parser.parse_known_args()
    python = prepare_environment("test")
    typed = [argument for argument in sys.argv[1:] if argument not in TIERS]
    tier = [word for name, words in TIERS.items() if getattr(args, name[2:]) for word in words]
    rooms = COMPARED if args.all else _changed_rooms()
    checks = _list_checks(python, typed, tier, rooms, is_fast=args.fast)
    failed = [_typed(check) for check in _run_checks(checks)]
    seconds = sum(os.times()[2:4])  # of the commands; 0 on Windows, which does not count them
    if args.fast and not typed and seconds > MAX_SECONDS:
        failed.append(f"{seconds:.0f} processor seconds of at most {MAX_SECONDS}: {TOO_LONG}")
    if failed:
        print(f"Failed: {'; '.join(failed)}")
        raise SystemExit(1)


def _list_checks(
    python: Path, typed: list[str], tier: list[str], rooms: Sequence[str], is_fast: bool
) -> list[Check]:
    """Return the checks to run, in order."""
    workers = []
    if not any(argument.startswith("-n") for argument in typed):
        # neighbors mostly share what their file sets up
        workers = ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "worksteal"]
    tests = Check(python, ["pytest", *workers, *tier, *typed])
    if typed:
        return [tests]
    lint = [Check(python, ["ruff", "check", "."]), Check(python, ["ruff", "format", "--check", "."])]
    if is_fast:
        return [*lint, tests]
    return [*lint, Check(python, TYPES), tests, *_list_comparisons(python, workers, rooms)]


def _list_comparisons(python: Path, workers: Sequence[str], rooms: Sequence[str]) -> list[Check]:
    """Return the checks that compare recorded numbers on other processors and with another torch."""
    pytest = ["pytest", *workers, *RECORDED]
    checks = []
    if rooms:
        room_tests = [f"tests/{room}" for room in rooms]
        checks = [Check(python, [*pytest, *room_tests], settings) for settings in _processors()]
    # somebody has made it for this: another torch may differ anywhere
    tests_to_compare = [f"tests/{room}" for room in COMPARED]
    return checks + [Check(second, [*pytest, *tests_to_compare]) for second in _second_python()]


def _changed_rooms(root: Path = ROOT) -> list[str]:
    """Return those of COMPARED that the last commits or uncommitted changes have touched; all without git."""
    paths: list[str] = []
    for words in (["log", f"-{NUM_COMMITS}", "--format="], ["diff", "HEAD"]):
        try:
            command = ["git", *words, "--name-only"]
            done = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", errors="replace")
        except OSError:  # there is no git
            return [*COMPARED]
        if done.returncode:  # no clone, or one without a commit
            return [*COMPARED]
        paths += done.stdout.splitlines()
    changed = {path.removeprefix("tests/").partition("/")[0] for path in paths}
    return [room for room in COMPARED if room in changed or "golden" in changed]


def _processors(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[dict[str, str]]:
    """Return the settings of PROCESSORS that this processor can run. cpuinfo: Linux's description of it."""
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    flags = set(text.split())
    return [setting for setting, needed in PROCESSORS if flags.issuperset(needed.split())]


def _second_python() -> list[Path]:
    """Return the Python of the environment with another torch, if there is one."""
    named = os.environ.get(SECOND)
    inside = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    python = Path(named) if named else ROOT / ".venv-second" / inside
    if named and not python.is_file():
        raise UserError(f"{SECOND}={named}: there is no such file. Name the Python of an environment")
    return [python] if python.is_file() else []


def _typed(check: Check) -> str:
    """Return a check as it can be typed, with the settings of its environment."""
    settings = [f"{name}={value}" for name, value in check.settings.items()]
    if [check.python] == _second_python():
        settings.insert(0, f"{SECOND}={check.python}")
    return " ".join([*settings, *check.command])


def _run_checks(checks: list[Check]) -> list[Check]:
    """Run checks and return those that failed; the type checker, which uses one core, runs in parallel."""
    beside = [check for check in checks if check.command == TYPES]
    with tempfile.TemporaryFile() as output:
        processes = [_start(check, output) for check in beside]
        failed = [check for check in checks if check not in beside and _run_check(check)]
        failed += [check for check, process in zip(beside, processes, strict=True) if process.wait()]
        for check in beside:
            print(f"\n== {_typed(check)}")
        output.seek(0)
        print(output.read().decode(errors="replace"), flush=True)
    return failed


def _start(check: Check, output: IO[bytes] | None = None) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, **THREADS, **check.settings, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
    # hundreds of processes start: each would compile our modules, and each worker all tests
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    program = [str(check.python), "-m", *check.command]
    if check.command[0] == "pytest":
        program = [str(check.python), "-c", PYTEST, *check.command[1:]]
    return subprocess.Popen(program, cwd=ROOT, env=environment, stdout=output, stderr=output)


def _run_check(check: Check) -> int:
    """Run a check and return its exit code; failed tests run once more, alone."""
    print(f"\n== {_typed(check)}", flush=True)
    code = _start(check).wait()
    if check.command[0] == "pytest" and code == TESTS_FAILED and AGAIN not in check.command:
        print("\nThese tests failed. Alone, on a quiet machine, they:")
        again = [*check.command, AGAIN, "-v", "--maxfail=1", "-n", "0"]
        return _run_check(replace(check, command=again))
    return code


if __name__ == "__main__":
    command_line(main, needs_packages=False)
