"""Set the marks that follow from what a test calls and takes: `recorded`, `script`, `slow` and `fast`.

Three tiers, by the processor seconds of a case of each test, which `tests/durations.toml` holds:

- `fast`: at most CASES cases of each test that takes less than LONG seconds, starts no script and no browser
  and compiles nothing; and the cases marked `whole_way`.
- The default: all but what is marked `slow`. Of a test whose cases take more than TOGETHER seconds together
  a third of them; of one that takes more than COSTLY seconds the first case alone, and none of one that takes
  more than HEAVY, unless `tests/heavy.toml` says why. Tests that a row of `tests/seams.toml` needs are there
  with all cases.
- Everything: the rest too.

Which third is chosen by the test's name: of a file whose tests all have one case for each family, each test
leaves out other families.

`slow_cases("CASE", ...)` marks single cases of a quicker test as slow, because others show the same daily.
A test that has not been measured is in the default tier with all its cases.
"""

import functools
import inspect
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import CodeType, ModuleType
from typing import Any
from zlib import crc32

import pytest

from tests.durations import read_durations, read_heavy, read_seam_tests

Name = tuple[str, str]  # of a module, of a function in it
READER: Name = ("tests.golden_cases", "read_case")
PROJECTS = "tests.tiny."  # they read a tokenizer or a template there, and compare nothing
STARTERS: frozenset[Name] = frozenset(
    {
        *(("tests.commands", name) for name in ("run_script", "run_python", "run_program")),
        ("tests.faults.messages", "run_here"),
        ("tests.warm_processes", "__init__"),
        *(("tests.chromium", name) for name in ("open_page", "open_tabs")),
    }
)
COMPILES = "nothing_compiled"  # the fixture of tests that compile
CASES = 2  # of a test in the fast tier: the first and the last
# processor seconds of a case
NOTED = 0.04  # the table holds what takes more
LONG = 0.15
TOGETHER = 1.5  # of all cases
PART = 3  # of more than TOGETHER: one of so many
COSTLY = 0.25
HEAVY = 1.25


def set_marks(items: Sequence[pytest.Item]) -> None:
    """Mark the tests that read `tests/golden` or start a script, themselves or in their fixtures, those that
    are slow, and those of the fast tier.
    """
    durations = read_durations()
    quick: dict[str, list[pytest.Item]] = defaultdict(list)  # test -> its cases that may be in the fast tier
    daily = choose_daily(items, durations)
    for item in items:
        name = test_name(item.nodeid)
        fixtures = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009
        given = [getattr(item, "function", None), *(each.func for some in fixtures.values() for each in some)]
        for mark in _marks_of(tuple(given)):
            item.add_marker(mark)
        if item.nodeid not in daily:
            item.add_marker("slow")
        marks = {mark.name for mark in item.iter_markers()}
        if {"slow", "gpu"} & marks:
            continue
        if "whole_way" in marks:
            item.add_marker("fast")
        elif "script" not in marks and COMPILES not in fixtures and durations.get(name, 0.0) <= LONG:
            quick[name].append(item)
    for cases in quick.values():
        for item in spread(cases):
            item.add_marker("fast")


def choose_daily(items: Sequence[pytest.Item], durations: Mapping[str, float]) -> set[str]:
    """Return the node ids of the cases that the default tier has, by what a case of each test takes."""
    seams, heavy = read_seam_tests(), read_heavy()
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if not is_slow_case(item) and all(mark.name != "slow" for mark in item.iter_markers()):
            cases[test_name(item.nodeid)].append(item)
    daily: set[str] = set()
    for name, found in cases.items():
        seconds = 0.0 if name in seams else durations.get(name, 0.0)
        if seconds > HEAVY and name not in heavy:
            continue
        if seconds > COSTLY:
            chosen = found[:1]
        elif seconds * len(found) > TOGETHER:
            first = crc32(name.encode()) % PART
            chosen = [*found[first::PART], *filter(is_whole_way, found)]
        else:
            chosen = found
        daily.update(item.nodeid for item in chosen)
    return daily


def is_whole_way(item: pytest.Item) -> bool:
    """Return whether a case is in the fast tier whatever it takes."""
    return any(mark.name == "whole_way" for mark in item.iter_markers())


def spread(cases: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return at most CASES of the cases of a test, evenly from the first to the last."""
    if len(cases) <= CASES:
        return list(cases)
    return [cases[number * (len(cases) - 1) // (CASES - 1)] for number in range(CASES)]


def is_slow_case(item: pytest.Item) -> bool:
    """Return whether a mark `slow_cases` of a test names this case of it."""
    case = item.nodeid.partition("[")[2].removesuffix("]")
    return any(case in mark.args for mark in item.iter_markers("slow_cases"))


@functools.cache
def _marks_of(given: tuple[Any, ...]) -> list[str]:
    """Return the marks that follow from a test and its fixtures, of which a test has many cases."""
    follows = {"recorded": reads_recorded, "script": starts_script}
    return [mark for mark, applies in follows.items() if applies(*given)]


def test_name(node_id: str) -> str:
    """Return the name of a test without that of its case."""
    return node_id.partition("[")[0]


def reads_recorded(*functions: Any) -> bool:
    """Return whether functions of the tests read `tests/golden`: in what they call, or at the top of their
    file.
    """
    found = reached(functions, without=PROJECTS)
    return any((each.__module__, each.__name__) == READER for each in found if inspect.isfunction(each))


def starts_script(*functions: Any) -> bool:
    """Return whether functions of the tests start a script, in a process of its own or in this one, or a
    browser.
    """
    found = reached(functions)
    return subprocess in found or any(
        (each.__module__, each.__name__) in STARTERS for each in found if inspect.isfunction(each)
    )


def reached(functions: Iterable[Any], without: str = "-") -> set[Any]:
    """Return functions of the tests with all that they call. without: how modules begin that are left out."""
    waiting, seen = set(functions), set[Any]()
    while waiting:
        seen |= waiting
        waiting = {called for each in waiting for called in _called(each, without)} - seen
    return seen


@functools.cache
def _called(function: Any, without: str) -> frozenset[Any]:
    """Return which functions of the tests a function of the tests names; and `subprocess`."""
    function = inspect.unwrap(function) if callable(function) else None
    if not inspect.isfunction(function) or not function.__module__.startswith("tests."):
        return frozenset()
    if function.__module__.startswith(without):
        return frozenset()
    names = frozenset(_names(function.__code__))
    named = [function.__globals__.get(name) for name in names]
    modules = [each for each in named if isinstance(each, ModuleType) and each.__name__.startswith("tests.")]
    named += [getattr(module, name, None) for module in modules for name in names]
    for kind in [each for each in named if isinstance(each, type) and each.__module__.startswith("tests.")]:
        named += vars(kind).values()
    is_test = function.__module__.rpartition(".")[2].startswith("test_")
    if is_test and any(isinstance(each, dict) for each in named):  # CASE, TENSORS = read_case(...)
        named.append(function.__globals__.get(READER[1]))
    return frozenset(each for each in named if inspect.isfunction(each) or each is subprocess)


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that code uses, that of functions inside it too."""
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _names(each)
