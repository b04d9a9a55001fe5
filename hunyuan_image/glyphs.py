"""What is to be written in a picture: the texts in quotation marks of a prompt. Standard library only."""

import re

# in this order; an apostrophe is no mark, and a text ends on its line
_QUOTED = tuple(re.compile(f"{first}(.*?){last}") for first, last in ('""', "\u2018\u2019", "\u201c\u201d"))


def find_quoted(prompt: str) -> list[str]:
    """Return the texts in quotation marks: all straight ones, then single curly ones, then double ones."""
    return [text for pattern in _QUOTED for text in pattern.findall(prompt)]


def glyph_text(prompt: str) -> str | None:
    """Return what the glyph encoder reads of a prompt; None if nothing is to be written."""
    quoted = find_quoted(prompt)
    return "".join(f'Text "{text}". ' for text in quoted) if quoted else None
