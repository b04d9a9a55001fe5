"""Kinds of printed lines, such as warnings, for programs that display lines differently than a terminal.

Each line is written with its kind. A program that the browser starts prints the kind in front
of the line, and the browser removes it; in a terminal the kind is not printed.
"""

import os
from collections.abc import Iterable
from typing import NamedTuple

from modules.installation import TELLS_KINDS

FAULT = "fault"  # a file cannot be used, or the run would end
WARNING = "warning"  # something that the user may want to change
CAPTIONS = "captions"  # about files without a caption
NEXT, MEND = "next", "mend"  # about the next command; MEND: listed files have to be corrected first
KINDS = (FAULT, WARNING, CAPTIONS, NEXT, MEND)
END = "> "  # separates a kind from its line


class KindLine(str):
    """A printed line with its kind, one of KINDS, such as "warning"."""

    kind: str

    def __new__(cls, kind: str, text: str) -> "KindLine":
        """Make a line with one of KINDS."""
        line = super().__new__(cls, text)
        line.kind = kind
        return line


class ReadLine(NamedTuple):
    """A printed line, split into its kind and its text."""

    kind: str  # "" for a line without a kind
    text: str


def warning(text: str) -> str:
    """Return a line of the kind "warning": about something that the user may want to change."""
    return KindLine(WARNING, text)


def fault(text: str) -> str:
    """Return a line of the kind "fault": about an unusable file, or a setting that would end a run."""
    return KindLine(FAULT, text)


def show_kinds(lines: Iterable[str]) -> list[str]:
    """Return the lines to print; if the browser has started this program, their kinds are put in front."""
    if not os.environ.get(TELLS_KINDS):
        return [*lines]
    return [f"{line.kind}{END}{line}" if isinstance(line, KindLine) else line for line in lines]


def read_kind(printed: str) -> ReadLine:
    """Split a printed line into its kind, such as "warning", and its text; the kind is "" if it has none."""
    kind, end, text = printed.partition(END)
    return ReadLine(kind, text) if end and kind in KINDS else ReadLine("", printed)
