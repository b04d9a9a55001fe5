"""Measure tests in processor seconds, with or without `-n 2`.

A run of many cases prints what it took, room by room, and which tests of the default tier take longer than
`tests/durations.toml` knows. `python -m pytest --measure-tests` writes that table.
"""

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

import pytest

from tests import chromium
from tests.durations import read_durations, read_heavy, read_seam_tests, write_durations
from tests.marks import HEAVY, NOTED, test_name
from tests.warm_processes import SERVERS, WarmServer

# of a report; pytest-xdist sends them on with all else
SECONDS = "processor_seconds"
FEW_CASES = 1_000  # a run of fewer does not print its sums
MAX_LINES = 40  # of heavy tests


class Measuring:
    """Measures tests with their fixtures, and says which are too long for the default tier."""

    def __init__(self, writes_table: bool) -> None:
        """Begin. writes_table: Write the table of durations at the end."""
        self._writes_table = writes_table
        self._last = self._now()
        self._seconds: dict[str, float] = defaultdict(float)  # of each case

    @staticmethod
    def _now() -> float:
        """Return the processor time of this process, of those that it has waited for, and of those that run
        on: warm ones and browsers.
        """
        seconds = time.process_time() + chromium.read_seconds()
        try:
            import resource  # not on Windows
        except ImportError:
            return seconds
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return seconds + children.ru_utime + children.ru_stime + sum(map(read_children, SERVERS))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        """Begin a case. Processor time: other programs hardly change it."""
        self._last = self._now()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Note in the report of a phase what it took, its fixtures included."""
        report = yield
        now = self._now()
        setattr(report, SECONDS, now - self._last)
        self._last = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up the phases."""
        self._seconds[report.nodeid] += getattr(report, SECONDS, 0.0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print what was measured; write the table if that is asked for."""
        if self._writes_table:
            self._write_table()
        if len(self._seconds) >= FEW_CASES or self._writes_table:
            terminalreporter.write_line(self._describe_rooms())
            lines = [*self._list_heavy()]
            more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
            for line in (*lines[:MAX_LINES], *more):
                terminalreporter.write_line(line)

    def _write_table(self) -> None:
        """Replace what the table says of the tests that have run."""
        measured = self._measure_tests()
        durations = {name: seconds for name, seconds in read_durations().items() if name not in measured}
        durations |= {name: seconds for name, seconds in measured.items() if seconds > NOTED}
        write_durations(durations)

    def _measure_tests(self) -> dict[str, float]:
        """Return the seconds of the middle case of each test: the first may load what all use."""
        cases: dict[str, list[float]] = defaultdict(list)
        for name, seconds in self._seconds.items():
            cases[test_name(name)].append(seconds)
        return {name: statistics.median_low(seconds) for name, seconds in cases.items()}

    def _describe_rooms(self) -> str:
        """Return the processor seconds of the rooms, most first."""
        of_rooms: dict[str, float] = defaultdict(float)
        for name, seconds in self._seconds.items():
            folder, _, rest = name.partition("::")[0].removeprefix("tests/").partition("/")
            of_rooms[folder if rest else "tests"] += seconds
        rooms = ", ".join(f"{room} {seconds:.0f}" for room, seconds in _sort_by_seconds(of_rooms))
        return f"{sum(of_rooms.values()):.0f} processor seconds of {len(self._seconds)} cases: {rooms}"

    def _list_heavy(self) -> Iterator[str]:
        """Yield the tests that take more than HEAVY seconds, which the table does not say of them, or which
        have no reason.
        """
        known = {*read_durations(), *read_heavy(), *read_seam_tests()}
        for name, seconds in _sort_by_seconds(self._measure_tests()):
            if seconds > HEAVY and name not in known:
                yield f"{name} takes {seconds:.1f} s: make it smaller, or write tests/durations.toml anew"


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
