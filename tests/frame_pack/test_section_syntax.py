"""Texts that say something else for each section."""

import pytest

from frame_pack.section_syntax import parse_entries
from modules.errors import OptionError


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("a cat", {0: "a cat"}),
        ("1:a cat: it walks", {0: "1:a cat: it walks"}),  # without ;;; a colon is plain text
        ("0:a;;;1:b;;;-1:c", {0: "a", 1: "b", -1: "c"}),
        ("a;;;2:b", {0: "a", 2: "b"}),
        ("0-2:a;;;3:b", {0: "a", 1: "a", 2: "a", 3: "b"}),
        ("0:a;;;1-2:b;;;2:c", {0: "a", 1: "b", 2: "c"}),  # the later counts
        (" 0 : a ;;; 1 : b ", {0: "a", 1: "b"}),
        ("0:a: b;;;1:c:d", {0: "a: b", 1: "c:d"}),
        ("3:c;;;2:b", {0: "b", 2: "b", 3: "c"}),  # no entry 0: the first from the start
        ("-1:c;;;-2:b", {0: "b", -1: "c", -2: "b"}),  # the furthest from the end
        ("a cat: it walks;;;1:b", {0: "a cat: it walks", 1: "b"}),
        (r"C:\a.png;;;-1:D:\b.png", {0: r"C:\a.png", -1: r"D:\b.png"}),
        (r"0:C:\a.png;;;1:D:\b.png", {0: r"C:\a.png", 1: r"D:\b.png"}),
        ("--1:a;;;1:b", {0: "--1:a", 1: "b"}),
        ("0:a;;; ;;;", {0: "a"}),
        (";;;", {0: ""}),
        ("-1-1:a;;;0:b", {-1: "a", 0: "b", 1: "a"}),
    ],
)
def test_pieces_are_for_the_sections_they_name(text: str, entries: dict[int, str]) -> None:
    assert parse_entries(text, "--prompt") == entries


@pytest.mark.parametrize("text", ["3-1:a;;;0:b", "0-99999999:a;;;0:b"])
def test_ranges_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"--image_path: \d-\d+ is not a range of sections"):
        parse_entries(text, "--image_path")
