"""Regular expressions for module names, which have dots in models and underscores in LoRA files.

Examples of names are `blocks.0.ffn.2` and `lora_unet_blocks_0_ffn_2`. A pattern that matches nothing as
written is tried in the other spelling.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_EXAMPLES = 3  # similar names in a message
MAX_WORDS = 5  # words of a module's name that are compared and shown together
MAX_CHARACTERS = 200  # of a pattern that are compared with names


@dataclass(frozen=True)
class NamePattern:
    """Stands in for a compiled regular expression, but matches a fixed set of names.

    LoRA files write module names with dots or underscores (`blocks.0.attn`, `blocks_0_attn`); the set
    contains the names that the typed pattern matches in either spelling.
    """

    pattern: str  # as it was typed
    names: frozenset[str]  # with dots and with underscores

    def match(self, name: str) -> bool:
        """Return whether the typed pattern matches this name as written with dots or with underscores."""
        return name in self.names

    search = match


def in_any_spelling(pattern: str) -> str:
    r"""Return the regular expression with each `\.` and `_` matching either a dot or an underscore."""
    tokens: list[str] = []
    in_class = False  # inside [...]
    for token in re.findall(r"\\.|.", pattern, re.DOTALL):
        in_class = token == "[" or (in_class and token != "]")
        is_separator = token in ("\\.", "_") and not in_class
        tokens.append("[._]" if is_separator else token)
    rewritten = "".join(tokens)
    try:
        re.compile(rewritten)
    except re.error:  # the name of a group has an underscore
        return pattern
    return rewritten


def describe_unfit(pattern: str, names: Iterable[str]) -> str:
    """Return a sentence saying that a pattern matches none of these names, with similar names.

    Args:
        pattern: The pattern.
        names: Names with underscores.
    """
    # reduce the pattern to words and N for numbers: `blocks\.\d+\.ffn` -> `blocks_ffn`
    text = re.sub(r"\\[a-zA-Z]", "_", pattern)
    text = re.sub(r"[\W_]+", "_", text)
    text = re.sub(r"\d+", "N", text).strip("_")
    # each name once instead of once per block, in order
    numberless_names = dict.fromkeys(re.sub(r"\d+", "N", name) for name in names)
    # compared with pieces of names, because patterns match pieces of names
    runs = dict.fromkeys(run for name in numberless_names for run in _list_runs(name.split("_")))
    similar = difflib.get_close_matches(text[:MAX_CHARACTERS], list(runs), MAX_EXAMPLES, cutoff=0.5)
    examples = similar or list(numberless_names)[:MAX_EXAMPLES]
    return f"'{pattern}' matches no name and has no effect. Similar: {', '.join(examples)} (N: a number)"


def _list_runs(words: list[str]) -> Iterator[str]:
    """Yield all runs of up to MAX_WORDS consecutive words, except runs that start with a number."""
    for start, word in enumerate(words):
        if word == "N":
            continue
        for end in range(start + 1, min(start + MAX_WORDS, len(words)) + 1):
            yield "_".join(words[start:end])
