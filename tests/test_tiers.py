"""The default tier has a budget, and what is heavy has a reason."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests import long_tests, marks
from tests.browser import test_light
from tests.durations import is_there, read_durations, read_heavy, write_durations
from tests.long_tests import Measuring
from tests.marks import CASES, COSTLY, HEAVY, spread, starts_script
from tests.warm_processes import CAN_BE_WARM, WarmServer

# Processor seconds of the tests in tests/durations.toml that the default tier may have, on the machine of the
# table. What is quicker takes a third as long. Lower it after each cut.
BUDGET = 1150.0
BUSY = "import time\nwhile time.process_time() < 0.06: pass"  # a program that takes as much on any machine


def test_the_default_tier_is_within_its_budget(request: pytest.FixtureRequest) -> None:
    """Of what is collected now: all files in a run of the default tier."""
    durations = read_durations()
    names = [
        marks.test_name(item.nodeid)
        for item in request.session.items
        if item.get_closest_marker("slow") is None and item.get_closest_marker("gpu") is None
    ]
    assert sum(durations.get(name, 0.0) for name in names) < BUDGET


@pytest.mark.parametrize("name", sorted(read_heavy()))
def test_a_heavy_test_is_there_and_says_what_else_would_not_notice(name: str) -> None:
    assert is_there(name)
    assert len(read_heavy()[name].split()) >= 5


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("tests/a.py::test_quick", [1, 2, 3]),
        ("tests/a.py::test_not_measured", [1, 2, 3]),
        ("tests/a.py::test_costly", [1]),
        ("tests/a.py::test_heavy", []),
        ("tests/a.py::test_heavy_with_a_reason", [1]),
        ("tests/a.py::test_over_a_seam", [1, 2, 3]),
        ("tests/a.py::test_long_together", [1, 4, 7]),
        ("tests/b.py::test_long_together", [2, 5, 8]),
    ],
)
def test_what_a_case_takes_decides_how_many_are_in_the_default_tier(
    monkeypatch: pytest.MonkeyPatch, name: str, cases: list[int]
) -> None:
    durations = {
        "quick": COSTLY,
        "costly": HEAVY,
        "heavy": 9.0,
        "heavy_with_a_reason": 9.0,
        "over_a_seam": 9.0,
        "long_together": COSTLY,
    }
    table = {f"tests/{file}.py::test_{key}": seconds for key, seconds in durations.items() for file in "ab"}
    monkeypatch.setattr(marks, "read_durations", lambda: table)
    monkeypatch.setattr(marks, "read_heavy", lambda: {"tests/a.py::test_heavy_with_a_reason": "a reason"})
    monkeypatch.setattr(marks, "read_seam_tests", lambda: {"tests/a.py::test_over_a_seam"})
    count = 9 if name.endswith("long_together") else 3
    items = [FakeItem(f"{name}[{number}]") for number in range(1, count + 1)]
    marks.set_marks(cast(list[pytest.Item], items))
    assert [number for number, item in enumerate(items, 1) if "slow" not in item.marks] == cases


class FakeItem:
    """A case of a test, as far as marks look at it."""

    def __init__(self, nodeid: str) -> None:
        self.nodeid = nodeid
        self.marks: list[str] = []
        self._fixtureinfo = SimpleNamespace(name2fixturedefs={})

    def add_marker(self, name: str) -> None:
        self.marks.append(name)

    def iter_markers(self, name: str | None = None) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=mark, args=()) for mark in self.marks if name in {None, mark}]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 10, 11])
def test_of_many_cases_the_first_and_the_last_are_fast(count: int) -> None:
    chosen = cast(list[Any], spread(cast(list[Any], list(range(count)))))
    assert len(chosen) == len(set(chosen)) == min(count, CASES)
    assert (chosen[0], chosen[-1]) == (0, count - 1)


def test_the_table_is_read_as_it_was_written_without_tests_that_are_gone(tmp_path: Path) -> None:
    here = "tests/test_tiers.py::test_the_default_tier_is_within_its_budget"
    path = tmp_path / "durations.toml"
    write_durations({here: 1.5, "tests/test_tiers.py::test_gone": 2.0, "tests/gone.py::test_a": 2.0}, path)
    assert read_durations(path) == {here: 1.5}
    assert read_durations(tmp_path / "none.toml") == {}


def test_a_process_that_is_waited_for_counts() -> None:
    """A test that starts a script is not quick, whatever its own process does."""
    pytest.importorskip("resource", reason="Windows does not count the time of other processes")
    import subprocess
    import sys

    before = Measuring._now()
    subprocess.run([sys.executable, "-S", "-c", BUSY], check=True)
    assert Measuring._now() - before > 0.03


@pytest.mark.skipif(not CAN_BE_WARM, reason="a copy of a process is started on Linux alone")
def test_a_copy_of_a_warm_process_counts() -> None:
    """One that has ended: its process waits for it, not the test's."""
    import subprocess
    import sys

    burn = f"subprocess.run([sys.executable, '-S', '-c', {BUSY!r}])"
    code = f"import subprocess, sys; {burn}; print(flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        process.stdout.readline()
        seconds = long_tests.read_children(cast(WarmServer, SimpleNamespace(pid=process.pid)))
        process.communicate(b"\n")
    assert seconds > 0.03
    assert long_tests.read_children(cast(WarmServer, SimpleNamespace(pid=process.pid))) == 0


def test_a_run_says_what_its_rooms_take_and_names_what_is_heavy() -> None:
    measuring = Measuring(writes_table=False)
    known = max(read_durations())
    for name, seconds in (
        ("tests/wan/test_a.py::test_a[1]", 1.5),
        ("tests/wan/test_a.py::test_a[2]", 0.1),
        ("tests/wan/loaders/test_b.py::test_b", 3.0),
        (f"{known}[1]", 9.0),
        (f"{min(read_heavy())}[1]", 7.0),
        ("tests/test_d.py::test_d", 0.4),
    ):
        measuring._seconds[name] = seconds
    rooms = measuring._describe_rooms()
    assert rooms.startswith("21 processor seconds of 6 cases: ")
    assert "wan 5" in rooms
    [line] = measuring._list_heavy()
    assert line.startswith("tests/wan/loaders/test_b.py::test_b takes 3.0 s")


def test_what_opens_a_page_in_a_browser_is_not_quick() -> None:
    """A browser takes 1.3 to 2 processor seconds, most of them in processes that end later."""
    assert starts_script(test_light.test_a_hidden_page_asks_for_nothing)
    assert not starts_script(test_of_many_cases_the_first_and_the_last_are_fast)
