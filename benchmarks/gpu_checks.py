"""Run the tests marked `gpu` in groups, so that a crash or a hang of one group does not lose the others.

    python benchmarks/gpu.py --check [--seconds 560] [--output checks.json] [FILE or FOLDER ...]

Each file of tests runs in its own process. A line is printed when it has ended: how many tests passed,
failed and were skipped, and the seconds; then the messages of failures and the reasons of skipped tests. A
file that needs a package that is not installed counts as skipped. The exit code is 1 if a test failed, a
process crashed or took too long, or no test ran at all. Needs torch and pytest only.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.child_process import Children, end_with_children, run_child_process  # noqa: E402

MARK = "mark.gpu"  # what a file of such tests has in its text
SECONDS = 560.0  # of all groups
GROUP_SECONDS = 400.0
LATE = "test_compile.py"  # takes longest of the parts' tests
# groups that run side by side, on a GPU with so many bytes and with cores for them
JOBS, ROOMY = 4, 40 << 30
LONGEST = 4000  # characters of a message


@dataclass
class Group:
    """Result of one file of tests."""

    name: str
    passed: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> tests
    failures: list[dict[str, str]] = field(default_factory=list)  # test, message
    seconds: float = 0.0
    slowest: list[tuple[float, str]] = field(default_factory=list)
    ended: str = "done"  # or why it did not come to its end
    running: str = ""  # the test that had begun when it ended so

    @property
    def is_good(self) -> bool:
        """Whether all tests ran and none failed."""
        return not self.failures and self.ended == "done"

    @property
    def count(self) -> int:
        """Number of tests that ran."""
        return self.passed + len(self.failures)


def main(argv: Sequence[str]) -> int:
    """Run the groups and return the exit code. `argv` are the arguments after --check."""
    parser = argparse.ArgumentParser(prog="gpu.py --check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "files", nargs="*", type=Path, help="files or folders of tests; default: all marked gpu"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all; default {SECONDS:.0f}")
    parser.add_argument(
        "--group_seconds", type=float, default=GROUP_SECONDS, help=f"for a file; default {GROUP_SECONDS:.0f}"
    )
    parser.add_argument("--jobs", type=int, help="files at a time; default: by GPU and cores")
    parser.add_argument("--output", type=Path, help="write all results to this JSON file")
    parser.add_argument("--markers", default="gpu", help="as pytest's -m; default gpu")
    args = parser.parse_args(argv)
    if args.markers == "gpu" and not has_device():
        print(
            "Nothing was checked: torch sees no CUDA device here. It needs an NVIDIA GPU, its driver, and a"
        )
        print(
            'torch built for CUDA (`python -c "import torch; print(torch.version.cuda)"` prints its version).'
        )
        return 1
    machine = describe_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    paths = [path for given in args.files for path in list_test_files(given)] or find_files(ROOT / "tests")
    groups: list[Group] = []
    begun = time.monotonic()
    for group in run_groups(
        paths, args.markers, begun + args.seconds, args.group_seconds, args.jobs or jobs_here()
    ):
        groups.append(group)
        print(report(group), flush=True)
        if args.output is not None:
            write_results(args.output, machine, groups)  # each time: a killed command keeps what it has
    ran, failed = sum(group.count for group in groups), [group for group in groups if not group.is_good]
    print(f"\n{ran} tests ran in {time.monotonic() - begun:.0f} s.", end=" ")
    if not ran:
        print("Nothing was checked.")
        return 1
    print(f"Not good: {', '.join(group.name for group in failed)}." if failed else "All is good.")
    return 1 if failed else 0


def run_groups(
    paths: Sequence[Path],
    markers: str,
    end: float,
    seconds: float,
    jobs: int,
    failures: Path | None = None,
) -> Iterator[Group]:
    """Run files of tests, several at a time, and yield each when it has ended.

    Args:
        paths: The files.
        markers: Marker expression of pytest.
        end: End of the whole run, by the monotonic clock.
        seconds: Limit for a file.
        jobs: Number of files at a time.
        failures: File that gets the message of each failed test at once.
    """
    children: Children = []

    def run(path: Path) -> Group:
        left = end - time.monotonic()
        if left < 1:
            return Group(make_check_name(path), ended="not begun: the time is over")
        return run_group(path, markers, min(left, seconds), children, failures)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield from (done.result() for done in as_completed([pool.submit(run, path) for path in paths]))
        except BaseException:  # Ctrl-C reaches only this process
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                end_with_children(child)
            raise


def has_device() -> bool:
    """Return whether tests marked `gpu` can run: on CUDA, or on what the environment names."""
    import torch

    return torch.cuda.is_available() or "REELSMITH_TEST_DEVICE" in os.environ


def jobs_here() -> int:
    """Return how many files of tests this machine can run at a time."""
    import torch

    if not torch.cuda.is_available() or (os.cpu_count() or 1) < 2 * JOBS:
        return 1
    return JOBS if torch.cuda.get_device_properties(0).total_memory >= ROOMY else 1


def list_test_files(path: Path) -> list[Path]:
    """Return the files of tests in a folder; a file itself."""
    return sorted(path.rglob("test_*.py")) if path.is_dir() else [path]


def find_files(folder: Path) -> list[Path]:
    """Return the files of tests for a GPU: first those of parts, then whole runs, then all others.

    Those in the folder gpu need few packages.
    """
    own = list_test_files(folder / "gpu")
    own.sort(key=lambda path: (len(path.parts), path.name == LATE))
    others = [path for path in sorted(folder.rglob("test_*.py")) if path not in own]
    return own + [path for path in others if MARK in path.read_text(encoding="utf-8")]


def describe_machine() -> dict[str, str]:
    """Return what the results depend on."""
    import torch

    found = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "torch": torch.__version__}
    if torch.cuda.is_available():
        found |= {
            "device": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
        }
    else:
        found["device"] = "none: torch sees no CUDA device"
    return found


def run_group(
    path: Path, markers: str, seconds: float, children: Children, failures: Path | None = None
) -> Group:
    """Run one file of tests in a process of its own, for at most `seconds`.

    `children` holds the process; `failures` is as in `run_groups`.
    """
    group, begun = Group(make_check_name(path)), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        record, log = Path(folder) / "record.jsonl", Path(folder) / "log.txt"
        command = [sys.executable, __file__, "--child", str(path), markers, str(record)]
        command += [] if failures is None else [str(failures.resolve())]
        with log.open("wb") as output:
            code = run_child_process(
                command, seconds, output, folder=ROOT, environment=child_environment(), children=children
            )
        if code is None:
            group.ended, code = f"stopped after {seconds:.0f} seconds", 0
        read_record(record, group)
        text = log.read_text(encoding="utf-8", errors="replace")
    group.seconds = round(time.monotonic() - begun, 1)
    judge(group, code, text)
    return group


def child_environment() -> dict[str, str]:
    """Return the environment of a group's process: cuBLAS sums in one order, text is UTF-8.

    Groups run in parallel, and what they compute on the CPU is small: each uses a few cores.
    """
    own = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": str(min(4, os.cpu_count() or 1))}
    # packages may come from a folder that the caller has put on the path
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**own, **os.environ, "PYTHONUTF8": "1", "PYTHONPATH": os.pathsep.join(paths)}


def judge(group: Group, code: int, text: str) -> None:
    """Record how a process ended: its exit code and its output."""
    if group.ended != "done":
        return
    group.running = "" if code in (0, 1, 5) else group.running
    if code not in (0, 1, 5):  # pytest's: all passed, some failed, none selected
        group.ended = f"ended with exit code {code}: {last_lines(text)}"
    elif code == 1 and not group.failures:
        group.ended = f"pytest failed: {last_lines(text)}"


def last_lines(text: str, count: int = 12) -> str:
    """Return the last lines of a text, up to a limit of characters."""
    return "\n".join(text.strip().splitlines()[-count:])[-LONGEST:]


def read_record(record: Path, group: Group) -> None:
    """Add to a group what its process recorded."""
    lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
    for line in lines:
        with contextlib.suppress(ValueError):  # cut short by a crash
            note_event(json.loads(line), group)
    group.slowest = sorted(group.slowest, reverse=True)[:5]


def note_event(event: dict[str, Any], group: Group) -> None:
    """Add one event of a process: a test began, or had a result."""
    kind, test = event["kind"], event["test"]
    if kind == "begun":
        group.running = test
    elif kind == "passed":
        group.passed += 1
    elif kind == "skipped":
        group.skipped[event["message"]] = group.skipped.get(event["message"], 0) + 1
    elif kind == "failed":
        group.failures.append({"test": test, "message": event["message"][-LONGEST:]})
    if "seconds" in event:
        group.slowest.append((round(event["seconds"], 1), test))


def report(group: Group) -> str:
    """Return the line of a group, with its failures and the reasons of skipped tests below."""
    skipped = sum(group.skipped.values())
    line = f"{group.name}: {group.passed} passed, {len(group.failures)} failed, {skipped} skipped"
    lines = [f"{line}, {group.seconds:.0f} s"]
    if group.ended != "done":
        lines.append(f"  {group.ended}" + (f" (in {group.running})" if group.running else ""))
    for failure in group.failures:
        lines += [f"  FAILED {failure['test']}", *indented(failure["message"])]
    lines += [f"  skipped {count}: {reason}" for reason, count in group.skipped.items()]
    return "\n".join(lines)


def indented(text: str, maximum: int = 25) -> list[str]:
    """Return the lines of a text indented; the middle of a long text is left out."""
    lines = text.splitlines()
    if len(lines) > maximum:
        lines = [*lines[:3], "...", *lines[3 - maximum :]]
    return ["    " + line for line in lines]


def make_check_name(path: Path) -> str:
    """Return the path of a file relative to the checkout, if it is in it."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def write_results(path: Path, machine: dict[str, str], groups: Sequence[Group]) -> None:
    """Write all results so far."""
    found = {**machine, "groups": [asdict(group) for group in groups]}
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


class Recorder:
    """A plugin of pytest that writes events at once, so that a crash loses nothing."""

    def __init__(self, path: Path, failures: Path | None = None) -> None:
        """Write to `path`; `failures` is a text file that several processes append to."""
        self._file = path.open("a", encoding="utf-8")
        self._failures = failures

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Record that a test has begun."""
        self._note("begun", nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record the result of a test."""
        if report.skipped:
            self._note("skipped", report.nodeid, reason_of(report.longrepr))
        elif report.failed:
            self._note("failed", report.nodeid, f"{report.when}: {report.longreprtext}")
        elif report.when == "call":
            self._note("passed", report.nodeid, seconds=report.duration)

    def pytest_collectreport(self, report: Any) -> None:
        """Record a file that cannot be collected: skipped if a package is missing, else failed."""
        if report.failed:
            missing = missing_package(report.longreprtext)
            kind, why = ("skipped", f"needs {missing}") if missing else ("failed", report.longreprtext)
            self._note(kind, report.nodeid, why)
        elif report.skipped:
            self._note("skipped", report.nodeid, reason_of(report.longrepr))

    def _note(self, kind: str, test: str, message: str = "", seconds: float | None = None) -> None:
        event: dict[str, Any] = {"kind": kind, "test": test, "message": message}
        if seconds is not None:
            event["seconds"] = seconds
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()
        if kind == "failed" and self._failures is not None:
            with self._failures.open("a", encoding="utf-8") as file:
                file.write(f"FAILED {test}\n{message[-LONGEST:]}\n\n")


def reason_of(longrepr: Any) -> str:
    """Return why a test was skipped: pytest gives file, line and reason."""
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")


def missing_package(text: str) -> str | None:
    """Return the missing package that an error is about; None for modules of this project."""
    _, found, rest = text.rpartition("ModuleNotFoundError: No module named '")
    name = rest.partition("'")[0].partition(".")[0]
    return name if found and not (ROOT / name).is_dir() and importlib.util.find_spec(name) is None else None


@contextlib.contextmanager
def _one_setup(path: Path) -> Iterator[list[str]]:
    """Yield pytest's options: without the project's own selection, colors and cache."""
    with tempfile.TemporaryDirectory() as folder:
        yield [
            str(path),
            *("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--color=no", "--tb=short"),
            *("--strict-markers", f"--basetemp={Path(folder) / 'tests'}"),
        ]


def run_child(path: Path, markers: str, record: Path, failures: Path | None = None) -> int:
    """Run the tests of one file in this process. Returns pytest's exit code; 5 if a package is missing."""
    import pytest

    with _one_setup(path) as options:
        code = int(pytest.main([*options, "-m", markers], plugins=[Recorder(record, failures)]))
    kinds = [json.loads(line)["kind"] for line in record.read_text(encoding="utf-8").splitlines()]
    is_skipped = code == 2 and "failed" not in kinds and "skipped" in kinds  # 2: a file was not imported
    return 5 if is_skipped else 1 if code == 2 and "failed" in kinds else code


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        path, markers, *files = sys.argv[2:]
        sys.exit(run_child(Path(path), markers, *map(Path, files)))
    sys.exit(main(sys.argv[1:]))
