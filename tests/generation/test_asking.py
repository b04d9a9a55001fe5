"""Asking for a line at the console."""

import logging
import sys
from types import ModuleType

import pytest

from generation.asking import line_reader


def test_on_a_terminal_prompt_toolkit_asks_if_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class PromptSession:
        def __init__(self, sign: str) -> None:
            self.sign = sign

        def prompt(self) -> str:
            return f"edited after {self.sign}"

    package = ModuleType("prompt_toolkit")
    package.PromptSession = PromptSession  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "prompt_toolkit", package)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)

    assert line_reader([])() == "edited after > "


@pytest.mark.parametrize("end", ["quit", "exit", " Exit() ", ":q"])
def test_quit_ends_and_help_lists_the_options_of_a_line(
    end: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lines = iter(["help", "?", "a cat that wants to exit --d 1", end])
    monkeypatch.setattr("builtins.input", lambda sign: next(lines))
    with caplog.at_level(logging.INFO):
        read = line_reader([("w", "width"), ("d", "seed")])
        assert read() == "a cat that wants to exit --d 1"
    assert caplog.text.count("--d seed") == 2
    with pytest.raises(EOFError):
        read()
