"""Measure which tests are long: `python -m pytest -n 0 --write-long-tests`, all or some folders."""

import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.marks import LONG, LONG_TESTS, test_name


class Measuring:
    """Measures tests with their fixtures, and writes the names of those that are long."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)  # of the cases of each test

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Take processor time, which other programs hardly change."""
        begin = time.process_time()
        try:
            return (yield)
        finally:
            self._seconds[test_name(item)].append(time.process_time() - begin)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Replace what the list says of the tests that ran, and drop those whose file is gone."""
        listed = set(LONG_TESTS.read_text(encoding="utf-8").split())
        kept = {name for name in listed - self._seconds.keys() if _file(session, name).exists()}
        found = {name for name, each in self._seconds.items() if sum(each) > LONG * len(each)}
        LONG_TESTS.write_text("".join(f"{name}\n" for name in sorted(kept | found)), encoding="utf-8")


def _file(session: pytest.Session, name: str) -> Path:
    return session.config.rootpath / name.partition("::")[0]
