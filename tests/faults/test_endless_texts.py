"""Texts of strangers for which a pattern once took minutes or hours: each is read at once."""

import contextlib
import time
from collections.abc import Callable

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from browser.folders.datasets import DATASET_TABLE
from browser.jobs.launch import command_part
from browser.pages.generate.dropped_settings import read_dropped_settings
from modules.errors import UserError
from modules.media.audio import _read_subtitle
from modules.paths import hide_secrets

MAX_SECONDS = 5.0  # of the processor; each takes a hundredth of it
LONG = 200_000  # characters


def read_settings(line: str) -> None:
    with contextlib.suppress(UserError):
        read_dropped_settings({"parameters": f"a cat\n{line}"})


def read_ass(text: str) -> None:
    _read_subtitle("ass", text.encode())


def read_srt(text: str) -> None:
    _read_subtitle("subrip", text.encode())


CASES: dict[str, tuple[Callable[[str], object], str]] = {
    "settings with backslashes": (read_settings, 'Steps: "' + "\\" * 60 + "x"),
    "settings of one word": (read_settings, "a" * LONG),
    "settings of many words": (read_settings, "a " * LONG),
    "settings with quotes": (read_settings, ', a: "\\' * LONG),
    "a table of empty lines": (DATASET_TABLE.search, "\n" * LONG),
    "a table of blanks": (DATASET_TABLE.search, " \t" * LONG),
    "a line of blanks": (command_part, "cd " + " " * LONG),
    "a line of a folder": (command_part, "cd x" + " " * LONG),
    "an address of letters": (hide_secrets, "a1" * LONG),
    "a subtitle of brackets": (read_ass, "{" * LONG),
    "a subtitle of tags": (read_srt, "<a" * LONG),
}


@pytest.mark.parametrize("case", CASES)
def test_a_text_of_a_stranger_is_read_at_once(case: str) -> None:
    read, text = CASES[case]
    began = time.process_time()

    read(text)

    assert time.process_time() - began < MAX_SECONDS


def test_marks_of_style_are_left_out_as_before() -> None:
    assert _read_subtitle("ass", b"0,0,Default,,0,0,0,,{\\i1}a{\\i0} b\\Nc {x") == "a b\nc {x"
    assert _read_subtitle("subrip", b"<i>a</i> < b <b >c> <d") == "a < b c> <d"
