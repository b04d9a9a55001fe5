"""Each command leaves the libraries out of its garbage collections, and none of its networks."""

import gc
from pathlib import Path

import pytest
from torch import nn

from benchmarks import way
from modules.devices import freeze_libraries


def test_each_command_freezes_what_it_imported_before_it_loads_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that was frozen would never be collected. What was there before this test is frozen here."""
    modules_at_freeze: list[int] = []
    gc.freeze()

    def note_modules() -> None:
        modules_at_freeze.append(sum(isinstance(kept, nn.Module) for kept in gc.get_objects()))

    monkeypatch.setattr(gc, "freeze", note_modules)
    for commands in way.commands(tmp_path).values():
        for script, words in commands:
            gc.collect()  # networks of the command before
            modules_at_freeze.clear()
            freeze_libraries.cache_clear()  # as in a process of its own
            monkeypatch.setattr(gc, "get_freeze_count", lambda: 0)

            way.run_script(script, words)

            assert modules_at_freeze == [0]


def test_a_second_command_of_a_process_freezes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append("freeze"))
    for count in (365_000, 0):
        freeze_libraries.cache_clear()
        monkeypatch.setattr(gc, "get_freeze_count", lambda count=count: count)
        freeze_libraries()
        freeze_libraries()

    assert calls == ["freeze"]


def test_what_is_frozen_is_counted_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python walks through all of it: 0.2 s in a worker that has loaded the tests."""
    counted = iter([365_000])
    monkeypatch.setattr(gc, "get_freeze_count", lambda: next(counted))
    freeze_libraries.cache_clear()
    freeze_libraries()
    freeze_libraries()

    assert next(counted, None) is None
