"""Compare the marks `long` with measured times: `python -m pytest --measure-long-tests`."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest

from tests.marks import LONG, test_name

# of a report; pytest-xdist sends them on with all else
SECONDS = "processor_seconds"
MARKED = "is_marked_long"


class Measuring:
    """Measures tests with their fixtures, and prints those whose mark is missing or not needed."""

    def __init__(self) -> None:
        self._last = time.process_time()
        self._seconds: Counter[str] = Counter()  # of each case
        self._marked: set[str] = set()  # tests

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        """Begin a case. Processor time: other programs hardly change it."""
        self._last = time.process_time()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        """Note in the report of a phase what it took, its fixtures included, and whether it is marked."""
        report = yield
        setattr(report, MARKED, item.get_closest_marker("long") is not None)
        now = time.process_time()
        setattr(report, SECONDS, now - self._last)
        self._last = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up the phases."""
        self._seconds[report.nodeid] += getattr(report, SECONDS, 0.0)
        if getattr(report, MARKED, False):
            self._marked.add(test_name(report.nodeid))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the tests whose mark differs from what was measured."""
        cases: dict[str, list[float]] = defaultdict(list)
        for name, seconds in self._seconds.items():
            cases[test_name(name)].append(seconds)
        for name, seconds_of_cases in sorted(cases.items()):
            is_long = sum(seconds_of_cases) > LONG * len(seconds_of_cases)
            if is_long and name not in self._marked:
                terminalreporter.write_line(f"{name} is long: mark it with @pytest.mark.long")
            if not is_long and name in self._marked:
                terminalreporter.write_line(f"{name} is quick: remove its mark")
