"""Which tests compare with recorded numbers: the mark `recorded`."""

import functools
import inspect
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest

READER = ("tests.golden_cases", "read_case")
PROJECTS = "tests.tiny."  # they read a tokenizer or a template there, and compare nothing


def mark_recorded(items: Iterable[pytest.Item]) -> None:
    """Mark the tests that read `tests/golden`, themselves or in their fixtures."""
    for item in items:
        given = getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009
        if reads_recorded(getattr(item, "function", None), *(each.func for some in given for each in some)):
            item.add_marker("recorded")


def reads_recorded(*functions: Any) -> bool:
    """Return whether functions of the tests read `tests/golden`: in what they call, or at the top of their
    file.
    """
    waiting, seen = set(functions), set()
    while waiting:
        seen |= waiting
        waiting = {called for each in waiting for called in _called(each)} - seen
    return any((each.__module__, each.__name__) == READER for each in seen if inspect.isfunction(each))


@functools.cache
def _called(function: Any) -> frozenset[Any]:
    """Return which functions of the tests a function of the tests names."""
    function = inspect.unwrap(function) if callable(function) else None
    if not inspect.isfunction(function) or not function.__module__.startswith("tests."):
        return frozenset()
    if function.__module__.startswith(PROJECTS):
        return frozenset()
    names = function.__code__.co_names
    named = [function.__globals__.get(name) for name in names]
    modules = [each for each in named if isinstance(each, ModuleType) and each.__name__.startswith("tests.")]
    named += [getattr(module, name, None) for module in modules for name in names]
    is_test = function.__module__.rpartition(".")[2].startswith("test_")
    if is_test and any(isinstance(each, dict) for each in named):  # CASE, TENSORS = read_case(...)
        named.append(function.__globals__.get(READER[1]))
    return frozenset(each for each in named if inspect.isfunction(each))
