"""The fast tier has a budget, and what is heavy has a reason."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import run_tests
from tests import long_tests
from tests.browser import test_light
from tests.commands import ROOT
from tests.long_tests import Measuring, read_budgets, read_durations, read_heavy, write_durations
from tests.marks import CASES, COSTLY_OF_A_FILE, MAX_COSTLY, count_costly, spread, starts_script
from tests.warm_processes import CAN_BE_WARM, WarmServer

# What is left is for collecting in two processes, ruff, and files that nobody has measured yet.
BUDGET = 0.75 * run_tests.MAX_SECONDS
MAX_OF_A_FILE = 6.0  # seconds: what a room's file may take of the fast tier


def test_the_fast_tier_is_within_its_budget() -> None:
    assert sum(read_durations().values()) < BUDGET


def test_no_file_takes_much_of_the_fast_tier() -> None:
    long = {file: seconds for file, seconds in read_durations().items() if seconds > MAX_OF_A_FILE}
    full_ways = {file for file in long if "whole_way" in (ROOT / file).read_text(encoding="utf-8")}
    assert sorted(long.keys() - full_ways) == []


@pytest.mark.parametrize("file", sorted(read_durations()))
def test_a_measured_file_is_there(file: str) -> None:
    assert (ROOT / file).is_file(), "remove its line in tests/durations.toml"


@pytest.mark.parametrize("name", sorted(read_heavy()))
def test_a_heavy_test_is_there_and_says_what_else_would_not_notice(name: str) -> None:
    file, _, function = name.partition("::")
    assert re.search(rf"^def {function}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(read_heavy()[name].split()) >= 5


def test_no_file_has_more_costly_cases_than_its_budget(request: pytest.FixtureRequest) -> None:
    """Of what is collected now: all files in a run of the default tier."""
    counted, budgets = count_costly(request.session.items), read_budgets()
    over = {file: n for file, n in counted.items() if n > budgets.get(file, COSTLY_OF_A_FILE)}
    assert over == {}, "leave one case of each kind in the default tier, or say in heavy.toml what each shows"
    assert sum(counted.values()) <= MAX_COSTLY


def test_costly_cases_are_counted_by_their_files_but_for_slow_ones() -> None:
    items = []
    for name, marks in (
        ("tests/a/test_a.py::test_a[1]", ["script"]),
        ("tests/a/test_a.py::test_a[2]", ["script", "slow"]),
        ("tests/a/test_a.py::test_b", ["long", "script"]),
        ("tests/test_b.py::test_c", ["fast"]),
        ("tests/test_b.py::test_d", ["long"]),
    ):
        found = [SimpleNamespace(name=mark) for mark in marks]
        items.append(SimpleNamespace(nodeid=name, iter_markers=lambda found=found: found))
    assert count_costly(cast(list[pytest.Item], items)) == {"tests/a/test_a.py": 2, "tests/test_b.py": 1}


@pytest.mark.parametrize("file", sorted(read_budgets()))
def test_a_budget_is_of_a_file_and_above_what_any_file_may_have(file: str) -> None:
    assert (ROOT / file).is_file(), "remove its line in tests/heavy.toml"
    assert read_budgets()[file] > COSTLY_OF_A_FILE


@pytest.mark.parametrize("count", [1, 2, 3, 4, 10, 11])
def test_of_many_cases_the_first_and_the_last_are_fast(count: int) -> None:
    chosen = cast(list[Any], spread(cast(list[Any], list(range(count)))))
    assert len(chosen) == len(set(chosen)) == min(count, CASES)
    assert (chosen[0], chosen[-1]) == (0, count - 1)


def test_the_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    durations = {"tests/test_b.py": 1.5, "tests/a/test_a.py": 0.2}
    write_durations(durations, tmp_path / "durations.toml")
    assert read_durations(tmp_path / "durations.toml") == durations
    assert read_durations(tmp_path / "none.toml") == {}


def test_a_process_that_is_waited_for_counts() -> None:
    """A test that starts a script is not quick, whatever its own process does."""
    pytest.importorskip("resource", reason="Windows does not count the time of other processes")
    import subprocess
    import sys

    before = Measuring._now()
    subprocess.run([sys.executable, "-S", "-c", "for _ in range(4_000_000): pass"], check=True)
    assert Measuring._now() - before > 0.03


@pytest.mark.skipif(not CAN_BE_WARM, reason="a copy of a process is started on Linux alone")
def test_a_copy_of_a_warm_process_counts() -> None:
    """One that has ended: its process waits for it, not the test's."""
    import subprocess
    import sys

    burn = f"subprocess.run([sys.executable, '-S', '-c', {'for _ in range(6_000_000): pass'!r}])"
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
    measuring = Measuring(compares_marks=False)
    for name, seconds, marks in (
        ("tests/wan/test_a.py::test_a[1]", 1.5, {"long"}),
        ("tests/wan/loaders/test_b.py::test_b", 3.0, {"script"}),
        ("tests/wan/test_c.py::test_c", 9.0, {"slow"}),
        (f"{min(read_heavy())}[1]", 7.0, {"script"}),
        ("tests/test_d.py::test_d", 0.5, set[str]()),
    ):
        measuring._seconds[name] = seconds
        measuring._marks[name] = marks
    rooms = measuring._describe_rooms()
    assert rooms.startswith("21 processor seconds of 5 cases: ")
    assert "wan 14" in rooms
    [line] = measuring._list_heavy()
    assert line.startswith("tests/wan/loaders/test_b.py::test_b takes 3.0 s")


def test_what_opens_a_page_in_a_browser_is_not_quick() -> None:
    """A browser takes 1.3 to 2 processor seconds, most of them in processes that end later."""
    assert starts_script(test_light.test_a_hidden_page_asks_for_nothing)
    assert not starts_script(test_the_fast_tier_is_within_its_budget)
