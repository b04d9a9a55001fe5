"""What the metadata of a result say about the tools that made it."""

from collections.abc import Iterable, Mapping, Sequence

from modules.atomic_write import make_storable
from modules.media.tags import TOOL_TAG


def number_done(names: Iterable[str], done: Sequence[str]) -> dict[str, str]:
    """Return what has been done as post_1, post_2, counted on from the names that a file already has."""
    numbers = [int(found[1]) for name in names if (found := TOOL_TAG.fullmatch(name)) is not None]
    first = max(numbers, default=0) + 1
    return {f"post_{first + index}": make_storable(text) for index, text in enumerate(done)}


def add_done(said: Mapping[str, str], done: Sequence[str]) -> dict[str, str]:
    """Return what a file said before, and what has been done since."""
    return {**said, **number_done(said, done)}
