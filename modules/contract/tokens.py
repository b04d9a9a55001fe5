"""How a text encoder reads a text: number of tokens, cut-off, weights of parts.

Standard library only.
"""

import bisect
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


# where a token stands in a text, as its first character and the one behind its last; None: not in the text
Place = tuple[int, int] | None
CountTokens = Callable[[str], TokenCount]


def kept_characters(ends: Sequence[int], most: int, length: int) -> int:
    """Return how many of a text's `length` characters its first `most` tokens cover.

    ends: for each token of the text, the position behind its last character.
    """
    return length if len(ends) <= most else max(ends[:most], default=0)


def token_weights(text: str, places: Sequence[Place], spans: Sequence[tuple[int, int, float]]) -> list[float]:
    """Return the weight of each token: that of the part in which its first character lies, 1 outside of all.

    Blanks in front of a token do not count. spans: as of a `Prompt` of that text.
    """
    starts = [start for start, _, _ in spans]

    def of(place: Place) -> float:
        if place is None:
            return 1.0
        first = next((index for index in range(*place) if not text[index].isspace()), place[0])
        number = bisect.bisect_right(starts, first) - 1
        return spans[number][2] if number >= 0 and first < spans[number][1] else 1.0

    return [of(place) for place in places]
