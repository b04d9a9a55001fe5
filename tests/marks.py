"""Set the marks that follow from what a test calls: `recorded`, `script`, and the tier `fast`.

Three tiers. `fast`: of each test that takes less than LONG seconds of processor time, starts no script and no
browser and compiles nothing, at most CASES cases, and the cases marked `whole_way`. The default: all that is
not marked `slow`. Everything: the rest too. `tests/durations.toml` says what each file takes, and
`tests/heavy.toml` why a case of the default tier may take more than HEAVY seconds.
`slow_cases("CASE", ...)` marks single cases of a test as slow, because others of it show the same daily.
`long` marks a test whose cases take longer than LONG.

Of cases that start a script or take long, one of each kind is in the default tier. Two cases are of one kind
if shared code does the same for both, and what is the family's own in them is shown by a test of the default
tier that stays: the comment beside the mark `slow` names it. `tests/heavy.toml` says how many such cases a
file may have, and MAX_COSTLY how many all files together.
"""

import functools
import inspect
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType, ModuleType
from typing import Any

import pytest

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
LONG = 0.15  # seconds of processor time that a case of the fast tier may take
CASES = 2  # of a test in the fast tier: the first and the last
HEAVY = 2.0  # seconds of processor time that a case of the default tier may take
COSTLY_OF_A_FILE = 15  # cases of a file that start a script or take long, if heavy.toml has no line of it
MAX_COSTLY = 2_980  # such cases of all files: lower it after each cut


def set_marks(items: Iterable[pytest.Item]) -> None:
    """Mark the tests that read `tests/golden` or start a script, themselves or in their fixtures, and those
    of the fast tier.
    """
    quick: dict[str, list[pytest.Item]] = defaultdict(list)  # test -> its cases that may be in the fast tier
    for item in items:
        if is_slow_case(item):
            item.add_marker("slow")
        fixtures = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009
        given = [getattr(item, "function", None), *(each.func for some in fixtures.values() for each in some)]
        for mark in _marks_of(tuple(given)):
            item.add_marker(mark)
        marks = {mark.name for mark in item.iter_markers()}
        is_long = bool({"script", "long"} & marks) or COMPILES in fixtures
        if {"slow", "gpu"} & marks:
            continue
        if "whole_way" in marks:
            item.add_marker("fast")
        elif not is_long:
            quick[test_name(item.nodeid)].append(item)
    for cases in quick.values():
        for item in spread(cases):
            item.add_marker("fast")


def count_costly(items: Iterable[pytest.Item]) -> Counter[str]:
    """Return how many cases of each file start a script or take long, but for slow ones."""
    counted = Counter[str]()
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if {"script", "long"} & marks and not {"slow", "gpu"} & marks:
            counted[item.nodeid.partition("::")[0]] += 1
    return counted


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
