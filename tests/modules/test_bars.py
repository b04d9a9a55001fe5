"""Progress of a loop: a bar on a terminal, lines now and then elsewhere."""

import logging

import pytest

from modules.bars import BYTES, FRAMES, LINE_EVERY, Bar


def test_without_a_terminal_a_line_is_written_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    with Bar(100, "Loading dit\x1b[31m", BYTES, now=lambda: now[0], is_terminal=lambda: False) as bar:
        for moment in (1.0, LINE_EVERY, LINE_EVERY + 1, 2 * LINE_EVERY):
            now[0] = moment
            bar.update(10)

    assert caplog.messages == [
        r"Loading dit\x1b[31m: 20 bytes of 100 bytes, about 2 min left",
        r"Loading dit\x1b[31m: 40 bytes of 100 bytes, about 90 s left",
    ]


@pytest.mark.parametrize(
    ("total", "line"),
    [
        (30, "a.mp4: 20 of 30, 2 frames a second, about 5 s left"),
        (10, "a.mp4: 20 of 10, 2 frames a second, about 0 s left"),  # a header that says too few
        (None, "a.mp4: 20, 2 frames a second"),
    ],
)
def test_a_line_about_frames_has_their_rate(total: float | None, line: str) -> None:
    now = [0.0]
    with Bar(total, "a.mp4", FRAMES, now=lambda: now[0], is_terminal=lambda: False) as bar:
        bar.update(20)
        now[0] = 10.0

        assert bar.line() == line


def test_a_short_loop_says_nothing(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    for is_terminal in (False, True):
        with Bar(3, "Decoding", is_terminal=lambda is_terminal=is_terminal: is_terminal) as bar:  # type: ignore[misc]
            bar.update(3)

    assert not caplog.messages
    assert not capsys.readouterr().err


def test_a_bar_appears_after_a_second_and_is_removed(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    with Bar(4, "Decoding", "frame", now=lambda: now[0], is_terminal=lambda: True) as bar:
        bar.update()
        assert not capsys.readouterr().err
        now[0] = 1.5
        bar.update()
        shown = capsys.readouterr().err
    assert "Decoding:  50%|" in shown
    assert "2/4" in shown
    assert capsys.readouterr().err.endswith("\r")
    assert not caplog.messages
