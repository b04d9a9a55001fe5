"""How a text encoder reads a text: how many tokens it has, and where it is cut off. Standard library only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenCount:
    """The tokens of one text.

    tokens: of the whole text, with those that the encoder puts around it. limit: how many the encoder reads.
    """

    text: str  # as the encoder reads it, after its own cleaning
    tokens: int
    limit: int
    kept: int  # characters of `text` that are read

    @property
    def is_cut(self) -> bool:
        return self.kept < len(self.text)

    @property
    def cut_text(self) -> str:
        """Return the end of the text, which is not read."""
        return self.text[self.kept :]


CountTokens = Callable[[str], TokenCount]


def kept_characters(ends: Sequence[int], most: int, length: int) -> int:
    """Return how many of a text's `length` characters its first `most` tokens cover.

    ends: for each token of the text, the position behind its last character.
    """
    return length if len(ends) <= most else max(ends[:most], default=0)
