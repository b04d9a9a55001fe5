"""Texts that differ by section of a video: `0:a cat sits;;;1-2:it walks;;;-1:it sleeps`.

Each piece begins with the number of its section, counted from 0, or from the end with -1; `1-2` is a range
including both ends. A piece without a number is for section 0. A text without `;;;` is for section 0 as a
whole, whatever it contains. Standard library only.
"""

import re
from collections.abc import Iterator

from modules.errors import OptionError

SEPARATOR = ";;;"
_PLACES = re.compile(r"(-?[0-9]+)(?:-([0-9]+))?")
MOST_SECTIONS = 10_000  # hours of video; a larger number is a typing mistake


def parse_entries(text: str, option: str) -> dict[int, str]:
    """Return the texts by section number, always with an entry 0.

    If no piece is for section 0, the first one from the start takes its place, else the furthest from the
    end. If two pieces are for the same section, the later one counts. option: "--prompt", for messages.
    Raises OptionError for a range that runs backwards or is too long.
    """
    if SEPARATOR not in text:
        return {0: text}
    entries: dict[int, str] = {}
    for piece in text.split(SEPARATOR):
        if piece.strip():
            entries.update(_pieces(piece, option))
    if not entries:
        return {0: ""}
    nearest = min((index for index in entries if index >= 0), default=min(entries))
    return {0: entries[nearest], **entries}


def _pieces(piece: str, option: str) -> Iterator[tuple[int, str]]:
    head, colon, text = piece.partition(":")
    places = _PLACES.fullmatch(head.strip())
    if not colon or places is None:
        yield 0, piece.strip()
        return
    first = int(places[1])
    last = first if places[2] is None else int(places[2])
    if not first <= last < first + MOST_SECTIONS:
        raise OptionError(
            f"{option}: {head.strip()} is not a range of sections. Write the smaller number first, as 1-2."
        )
    for index in range(first, last + 1):
        yield index, text.strip()
