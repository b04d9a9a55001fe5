"""Boxes: with borders on a terminal, as lines elsewhere, never with codes or markup of the user's texts."""

import logging

import pytest

from modules import command
from modules.console import as_size, count_of, draw_box, in_words, show_box

HOSTILE = "[red]a [bold]cat[/] :smile: \x1b[31m猫"


def test_a_box_is_logged_as_aligned_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    show_box("Training", [("data", "2 clips"), ("files", "a\nb"), ("none", None)], [("Go on", "x 'a b'")])

    assert caplog.messages == [
        "Training\n  data:  2 clips\n  files: a\n         b\nGo on:\n  x 'a b'",
    ]


@pytest.mark.parametrize("colour", [False, True])
def test_texts_of_the_user_are_shown_as_they_are(colour: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    show_box("\x1b[2J", [("prompt", HOSTILE)])

    drawn = command._LineFormatter(colour, boxes=True).format(caplog.records[0])
    assert r"[red]a [bold]cat[/] :smile: \x1b[31m猫" in drawn
    assert r"\x1b[2J" in drawn
    assert ("\x1b[2m" in drawn) is colour
    assert "\x1b[2J" not in drawn
    assert "\x1b[31m" not in drawn


def test_a_terminal_gets_borders_of_its_width_and_commands_in_one_piece() -> None:
    long = "python x.py " + "y" * 200

    lines = draw_box("Done", [("path", "z" * 150)], [("Next", long)], False, True, columns=60).splitlines()

    assert lines[0].startswith("╭─ Done ─")
    assert {len(line) for line in lines[:-2]} == {60}
    assert "".join(lines).count("z") == 150
    assert lines[-2:] == ["Next:", f"  {long}"]


def test_a_terminal_without_line_characters_gets_ascii() -> None:
    assert draw_box("Done", [("a", "b")], [], False, False, columns=60).isascii()


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    class Screen:
        """A terminal."""

        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert command.wants_colour(Screen())
    monkeypatch.setenv(variable, value)
    assert not command.wants_colour(Screen())
    assert command.draws_boxes(Screen()) is (variable == "NO_COLOR")


def test_numbers_are_said_as_people_say_them() -> None:
    seconds = (0.4, 99, 100, 3599, 3600, 7800, 48 * 3600, 100 * 3600)
    said = ["0 s", "99 s", "2 min", "1 h", "1 h", "2 h 10 min", "2 d", "4 d 4 h"]
    assert [in_words(one) for one in seconds] == said
    assert [as_size(one) for one in (12, 9.96e3, 312e6, 1.44e9)] == [
        "12 bytes",
        "10.0 kB",
        "312 MB",
        "1.4 GB",
    ]
    assert (count_of(1, "clip"), count_of(0, "clip")) == ("1 clip", "0 clips")
