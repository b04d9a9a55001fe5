"""Regular expressions for module names, which have dots in models and underscores in LoRA files.

Examples of names are `blocks.0.ffn.2` and `lora_unet_blocks_0_ffn_2`. A pattern that fits nothing as its
option reads it is tried in the other spelling.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_NEAR = 3
MAX_WORDS = 5  # of a part of a name that is shown
MAX_CHARACTERS = 200  # of a pattern that is compared with names


@dataclass(frozen=True)
class NamePattern:
    """Replaces a pattern that fits these names only in a spelling that its option does not read."""

    pattern: str  # as it was typed
    names: frozenset[str]  # in all spellings

    def match(self, name: str) -> bool:
        """Whether the name is one of those that the pattern fits in its other spelling."""
        return name in self.names

    search = match


def in_any_spelling(pattern: str) -> str:
    r"""Return the regular expression with each `\.` and `_` fitting both a dot and an underscore."""
    parts: list[str] = []
    is_class = False
    for part in re.findall(r"\\.|.", pattern, re.DOTALL):
        is_class = part == "[" or (is_class and part != "]")
        parts.append("[._]" if part in ("\\.", "_") and not is_class else part)
    text = "".join(parts)
    try:
        re.compile(text)
    except re.error:  # the name of a group has an underscore
        return pattern
    return text


def describe_unfit(pattern: str, names: Iterable[str]) -> str:
    """Return a sentence about a pattern that matches none of these names, with the most similar names.

    Args:
        pattern: The pattern.
        names: Names with underscores.
    """
    text = re.sub(r"\\[a-zA-Z]", "_", pattern)
    text = re.sub(r"[\W_]+", "_", text)
    text = re.sub(r"\d+", "N", text).strip("_")
    kinds = dict.fromkeys(re.sub(r"\d+", "N", name) for name in names)
    parts = dict.fromkeys(part for kind in kinds for part in _parts(kind.split("_")))
    near = difflib.get_close_matches(text[:MAX_CHARACTERS], list(parts), MAX_NEAR, cutoff=0.5)
    examples = near or list(kinds)[:MAX_NEAR]
    return f"'{pattern}' fits no name, and changes nothing. Near it are {', '.join(examples)} (N: a number)"


def _parts(words: list[str]) -> Iterator[str]:
    """Yield all runs of consecutive words that begin with a word instead of a number."""
    for start, word in enumerate(words):
        for end in range(start + 1, min(start + MAX_WORDS, len(words)) + 1):
            if word != "N":
                yield "_".join(words[start:end])
