"""What is to be written in a picture: the texts in quotation marks of a prompt. Standard library only."""

import re
from collections.abc import Sequence

# in this order; an apostrophe is no mark, and a text ends on its line
_QUOTED = tuple(re.compile(f"{first}(.*?){last}") for first, last in ('""', "\u2018\u2019", "\u201c\u201d"))

BYTE_OFFSET = 3  # of byT5's token ids: those before the bytes are padding, end and unknown
PAD, END = 0, 1


def find_quoted(prompt: str) -> list[str]:
    """Return the texts in quotation marks, straight ones first, then single and double curly ones."""
    return [text for pattern in _QUOTED for text in pattern.findall(prompt)]


def glyph_text(prompt: str) -> str | None:
    """Return what the glyph encoder reads of a prompt; None if nothing is to be written."""
    quoted = find_quoted(prompt)
    return "".join(f'Text "{text}". ' for text in quoted) if quoted else None


def glyph_ids(text: str, limit: int) -> list[int]:
    """Return byT5's tokens of a text, the end token last. A longer text is cut.

    The colours and fonts of the released tokenizer are never used, so that no text is read as one.
    """
    ids = [byte + BYTE_OFFSET for byte in text.encode("utf-8")]
    return [*ids[: limit - 1], END]


def kept_glyphs(text: str, limit: int) -> int:
    """Return how many characters of a text fit into so many tokens, the end token among them."""
    kept: Sequence[int] = text.encode("utf-8")[: limit - 1]
    return len(bytes(kept).decode("utf-8", errors="ignore"))
