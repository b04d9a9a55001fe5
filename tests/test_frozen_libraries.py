"""Each command leaves the libraries out of its garbage collections, and none of its networks."""

import gc
from pathlib import Path

import pytest
from torch import nn

from benchmarks import way


def test_each_command_freezes_what_it_imported_before_it_loads_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that was frozen would never be collected. What was there before this test is frozen here."""
    modules_at_freeze: list[int] = []

    def note_modules() -> None:
        modules_at_freeze.append(sum(isinstance(kept, nn.Module) for kept in gc.get_objects()))

    monkeypatch.setattr(gc, "freeze", note_modules)
    for commands in way.commands(tmp_path).values():
        for script, words in commands:
            gc.collect()  # networks of the command before
            modules_at_freeze.clear()
            monkeypatch.setattr(gc, "get_freeze_count", lambda: 0)  # as in a process of its own

            way.run_script(script, words)

            assert modules_at_freeze == [0]


def test_a_second_command_of_a_process_freezes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from modules.devices import freeze_libraries

    calls: list[str] = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append("freeze"))
    for count in (0, 365_000):
        monkeypatch.setattr(gc, "get_freeze_count", lambda count=count: count)
        freeze_libraries()

    assert calls == ["freeze"]
