"""Measure which tests are long: `python -m pytest --write-long-tests`, all or some folders."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest

from tests.marks import LONG, LONG_TESTS

SECONDS = "processor_seconds"  # of a report; pytest-xdist sends it on with all else


class Measuring:
    """Measures tests with their fixtures, and writes the names of those that are long."""

    def __init__(self) -> None:
        self._last = time.process_time()
        self._seconds: Counter[str] = Counter()  # of each case

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        """Begin a case. Processor time: other programs hardly change it."""
        self._last = time.process_time()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        """Note in the report of a phase what it took, its fixtures included."""
        report = yield
        now = time.process_time()
        setattr(report, SECONDS, now - self._last)
        self._last = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up the phases."""
        self._seconds[report.nodeid] += getattr(report, SECONDS, 0.0)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Replace what the list says of the tests that ran, and drop those whose file is gone."""
        if hasattr(session.config, "workerinput"):
            return  # the process that started this one writes
        cases: dict[str, list[float]] = defaultdict(list)
        for name, seconds in self._seconds.items():
            cases[name.partition("[")[0]].append(seconds)
        listed = set(LONG_TESTS.read_text(encoding="utf-8").split())
        root = session.config.rootpath
        kept = {name for name in listed - cases.keys() if (root / name.partition("::")[0]).exists()}
        found = {name for name, each in cases.items() if sum(each) > LONG * len(each)}
        LONG_TESTS.write_text("".join(f"{name}\n" for name in sorted(kept | found)), encoding="utf-8")
