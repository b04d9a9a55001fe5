"""Measure tests in processor seconds, with or without `-n 2`.

A run of many cases prints what it took, room by room, and which cases of the default tier are heavy without a
line in `tests/heavy.toml`. `python -m pytest --measure-tests` also prints where a mark `long` is wrong, and
writes what the fast cases of each measured file take into `tests/durations.toml`.
"""

import os
import time
import tomllib
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT
from tests.marks import HEAVY, LONG, test_name
from tests.warm_processes import SERVERS, WarmServer

DURATIONS = ROOT / "tests" / "durations.toml"
HEAVY_TESTS = ROOT / "tests" / "heavy.toml"
HEADER = """# Processor seconds of the fast cases of each file, with their fixtures, measured by
# `python -m pytest --measure-tests -m fast`. tests/test_tiers.py holds their sum against a budget.
"""
# of a report; pytest-xdist sends them on with all else
SECONDS = "processor_seconds"
MARKS = "marks_of_case"
FEW_CASES = 1_000  # a run of fewer does not print its sums
MAX_LINES = 40  # of heavy cases


def read_durations(path: Path = DURATIONS) -> dict[str, float]:
    """Return the seconds of the fast cases of each file that has been measured."""
    return dict(tomllib.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def write_durations(durations: Mapping[str, float], path: Path = DURATIONS) -> None:
    """Write the table anew, sorted by file."""
    rows = [f'"{file}" = {seconds:.1f}\n' for file, seconds in sorted(durations.items())]
    path.write_text(HEADER + "".join(rows), encoding="utf-8")


def read_heavy(path: Path = HEAVY_TESTS) -> dict[str, str]:
    """Return why tests may take more than HEAVY seconds, by their names."""
    return {name: value for name, value in _parse(path).items() if isinstance(value, str)}


def read_budgets(path: Path = HEAVY_TESTS) -> dict[str, int]:
    """Return how many cases of the default tier that start a script or take long files may have."""
    return dict(_parse(path)["budgets"])


def _parse(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


class Measuring:
    """Measures tests with their fixtures, and says what is longer than its mark or its tier allows."""

    def __init__(self, compares_marks: bool) -> None:
        """Begin. compares_marks: Look at the marks, too, and write the table of durations."""
        self._compares_marks = compares_marks
        self._last = self._now()
        self._seconds: dict[str, float] = defaultdict(float)  # of each case
        self._marks: dict[str, set[str]] = {}  # of each case

    @staticmethod
    def _now() -> float:
        """Return the processor time of this process, of those that it has waited for, and of warm ones.

        What a browser takes is not known before it ends.
        """
        of_others = time.process_time()
        try:
            import resource  # not on Windows
        except ImportError:
            return of_others
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return of_others + children.ru_utime + children.ru_stime + sum(map(read_children, SERVERS))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        """Begin a case. Processor time: other programs hardly change it."""
        self._last = self._now()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Note in the report of a phase what it took, its fixtures included; in the first, the marks."""
        report = yield
        if report.when == "setup":
            setattr(report, MARKS, [mark.name for mark in item.iter_markers()])
        now = self._now()
        setattr(report, SECONDS, now - self._last)
        self._last = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up the phases."""
        self._seconds[report.nodeid] += getattr(report, SECONDS, 0.0)
        self._marks.setdefault(report.nodeid, set()).update(getattr(report, MARKS, ()))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print what was measured against the marks and the tiers; write the table if that is asked for."""
        if len(self._seconds) >= FEW_CASES or self._compares_marks:
            terminalreporter.write_line(self._describe_rooms())
            lines = [*self._list_heavy()]
            more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
            for line in (*lines[:MAX_LINES], *more):
                terminalreporter.write_line(line)
        if not self._compares_marks:
            return
        for line in self._list_wrong_marks():
            terminalreporter.write_line(line)
        of_files: dict[str, float] = defaultdict(float)
        for name, seconds in self._seconds.items():
            if "fast" in self._marks[name]:
                of_files[name.partition("::")[0]] += seconds
        if of_files:
            write_durations(read_durations() | dict(of_files))
            terminalreporter.write_line(f"fast cases: {sum(of_files.values()):.0f} processor seconds")

    def _describe_rooms(self) -> str:
        """Return the processor seconds of the rooms, most first."""
        of_rooms: dict[str, float] = defaultdict(float)
        for name, seconds in self._seconds.items():
            folder, _, rest = name.partition("::")[0].removeprefix("tests/").partition("/")
            of_rooms[folder if rest else "tests"] += seconds
        rooms = ", ".join(f"{room} {seconds:.0f}" for room, seconds in _sort_by_seconds(of_rooms))
        return f"{sum(of_rooms.values()):.0f} processor seconds of {len(self._seconds)} cases: {rooms}"

    def _list_wrong_marks(self) -> Iterator[str]:
        """Yield the tests whose mark `long` differs from what was measured."""
        cases: dict[str, list[float]] = defaultdict(list)
        marked = set()
        for name, seconds in self._seconds.items():
            cases[test_name(name)].append(seconds)
            if "long" in self._marks[name]:
                marked.add(test_name(name))
        for name, seconds_of_cases in sorted(cases.items()):
            is_long = sum(seconds_of_cases) > LONG * len(seconds_of_cases)
            if is_long and name not in marked:
                yield f"{name} is long: mark it with @pytest.mark.long"
            if not is_long and name in marked:
                yield f"{name} is quick: remove its mark"

    def _list_heavy(self) -> Iterator[str]:
        """Yield the cases of the default tier that take more than HEAVY seconds without a reason."""
        reasons = read_heavy()
        for name, seconds in _sort_by_seconds(self._seconds):
            if seconds > HEAVY and "slow" not in self._marks[name] and test_name(name) not in reasons:
                yield f"{name} takes {seconds:.1f} s: make it smaller, slow, or give it a line in heavy.toml"


def _sort_by_seconds(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return names with their seconds, most first."""
    return sorted(seconds.items(), key=lambda pair: -pair[1])


def read_children(server: WarmServer) -> float:
    """Return the processor seconds of the copies of a warm process that have ended."""
    try:
        line = Path(f"/proc/{server.pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:  # it has been ended by a test
        return 0.0
    user, system = line.rpartition(")")[2].split()[13:15]  # cutime and cstime of proc(5)
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
