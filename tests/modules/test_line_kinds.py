"""A line is printed with its kind for the browser alone, and read again without it."""

import pytest

from modules.installation import TELLS_KINDS
from modules.line_kinds import FAULT, KINDS, WARNING, KindLine, fault, read_kind, show_kinds, warning

LINES = [fault("a.png is damaged"), "plain > line", warning("b.png: tiny"), "  below"]


def test_a_terminal_gets_lines_without_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TELLS_KINDS, raising=False)
    assert show_kinds(LINES) == ["a.png is damaged", "plain > line", "b.png: tiny", "  below"]


def test_the_browser_reads_each_kind_and_the_line_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TELLS_KINDS, "1")
    read = [read_kind(line) for line in show_kinds(LINES)]
    assert [line.kind for line in read] == [FAULT, "", WARNING, ""]
    assert [line.text for line in read] == LINES


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_that_looks_like_one_with_a_kind_keeps_its_text(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TELLS_KINDS, "1")
    text = f"{kind}> x.png"
    (printed,) = show_kinds([KindLine(kind, text)])
    assert read_kind(printed) == (kind, text)
    assert read_kind("nothing> x.png") == ("", "nothing> x.png")
