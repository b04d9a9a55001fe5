"""The fast tier has a budget, and what is heavy has a reason."""

import re
from pathlib import Path
from typing import Any, cast

import pytest

import run_tests
from tests.browser import test_light
from tests.commands import ROOT
from tests.long_tests import Measuring, read_durations, read_heavy, write_durations
from tests.marks import CASES, spread, starts_script

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


def test_what_opens_a_page_in_a_browser_is_not_quick() -> None:
    """A browser takes 1.3 to 2 processor seconds, most of them in processes that end later."""
    assert starts_script(test_light.test_a_hidden_page_asks_for_nothing)
    assert not starts_script(test_the_fast_tier_is_within_its_budget)
