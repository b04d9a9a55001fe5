"""Match module names against the keys of PEFT's `alpha_pattern` and `rank_pattern`.

A key is the end of a module's path (`to_q`, `attn1.to_q`) or a regular expression for it. A file may come
from anywhere, and a hostile expression keeps Python's `re` busy for years, so the search has a time limit.
"""

import re
from collections.abc import Mapping

import regex

MAX_EXPRESSIONS = 1_000  # characters of all regular expressions of a file together
SECONDS = 0.5  # that a search for one path may take
_PLAIN = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


class PeftPatterns:
    """The keys of an `alpha_pattern` with their values; of several that match, PEFT takes the first."""

    def __init__(self, values: Mapping[str, float]) -> None:
        """Raises ValueError if a key is no expression, or if these are too long."""
        self._values = values
        self._places = {key: place for place, key in enumerate(values)}
        expressions = [key for key in values if not _PLAIN.fullmatch(key)]
        if sum(map(len, expressions)) > MAX_EXPRESSIONS:
            raise ValueError(f"its regular expressions have more than {MAX_EXPRESSIONS} characters in all")
        self._expressions = {key: _compile(key) for key in expressions}

    def find(self, path: str) -> float | None:
        """Return the value for a module path (`blocks.0.attn1.to_q`), or None if no key matches.

        Raises ValueError if an expression takes too long.
        """
        ends = [path, *(path[index + 1 :] for index, char in enumerate(path) if char == ".")]
        found = [end for end in ends if end in self._places]
        for key, pattern in self._expressions.items():
            try:
                if pattern.match(path, timeout=SECONDS):
                    found.append(key)
            except TimeoutError:
                raise ValueError(f"the key {key!r} takes too long to search {path} for") from None
        return self._values[min(found, key=self._places.__getitem__)] if found else None


def _compile(key: str) -> "regex.Pattern[str]":
    try:
        return regex.compile(rf"(.*\.)?({key})$")  # as PEFT does
    except regex.error as error:
        raise ValueError(f"the key {key!r} is no regular expression: {error}") from None
