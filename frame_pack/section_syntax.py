"""Texts that say something else for each section of a video: `0:a cat sits;;;1-2:it walks;;;-1:it sleeps`.

A piece begins with the section that it is for, counted from 0, or from the end with -1; `1-2` is a range with
both ends. A piece without such a number is for section 0, and so is a text without `;;;`, whatever stands in
it. Standard library only.
"""

import re
from collections.abc import Iterator

from modules.errors import OptionError

SEPARATOR = ";;;"
_PLACES = re.compile(r"(-?[0-9]+)(?:-([0-9]+))?")
MOST_SECTIONS = 10_000  # of a video: hours; more is a slip of the finger


def parse_entries(text: str, option: str) -> dict[int, str]:
    """The texts by section. 0 is always there: without one the first from the start stands for it, else the
    furthest from the end.

    A later piece counts where two are for the same section. option: "--prompt", for messages. Raises
    OptionError for a range that runs backwards or out of all bounds.
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
            f"{option}: {head.strip()} is no range of sections. Write the smaller number first, as 1-2."
        )
    for index in range(first, last + 1):
        yield index, text.strip()
