"""Alternatives in a prompt: `a {red|blue} car` becomes one of the two, `{3::red|blue}` red three times as
often.

Groups may be nested; nothing is drawn inside an alternative that is not chosen. Braces without a `|` between
them, and a brace without its partner, are plain text; so is what follows a backslash. Standard library only.
"""

import bisect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from modules.errors import OptionError

MOST_NESTED = 50
_MARKS = re.compile(r"\\[{}|]|[{}|]")
_WEIGHT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)::")
_ESCAPED = re.compile(r"\\([{}|])")

# weights of what is to choose from -> the index of one
Choose = Callable[[Sequence[float]], int]


@dataclass
class _Group:
    """The places of a group's braces and of the bars between them."""

    start: int
    end: int = 0
    bars: list[int] = field(default_factory=list)


def choose_alternatives(text: str, choose: Choose) -> str:
    """Return a text with one alternative of each group. What is escaped stays so until `unescape`.

    Raises OptionError if groups are nested more than MOST_NESTED deep, and as `choose`.
    """
    groups = _groups_of(text)
    starts = [group.start for group in groups]

    def of(start: int, end: int) -> str:
        pieces, place = [], start
        while (number := bisect.bisect_left(starts, place)) < len(groups) and groups[number].start < end:
            group = groups[number]
            first, last = branch_of(group)
            pieces += [text[place : group.start], of(first, last).strip()]
            place = group.end + 1
        return "".join([*pieces, text[place:end]])

    def branch_of(group: _Group) -> tuple[int, int]:
        edges = [group.start, *group.bars, group.end]
        branches = [(before + 1, after) for before, after in zip(edges, edges[1:], strict=False)]
        weights = [_WEIGHT.match(text, *branch) for branch in branches]
        index = choose([1.0 if found is None else float(found[1][:40]) for found in weights])
        found = weights[index]
        return branches[index] if found is None else (found.end(), branches[index][1])

    return of(0, len(text)) if groups else text


def unescape(text: str) -> str:
    """Return a text with `{`, `}` and `|` in place of `\\{`, `\\}` and `\\|`."""
    return _ESCAPED.sub(r"\1", text)


def _groups_of(text: str) -> list[_Group]:
    """Return the groups that have a choice, in the order in which they begin."""
    opened: list[_Group] = []
    found: list[_Group] = []
    for mark in _MARKS.finditer(text):
        if mark[0] == "{":
            opened.append(_Group(mark.start()))
        elif mark[0] == "|" and opened:
            opened[-1].bars.append(mark.start())
        elif mark[0] == "}" and opened:
            group = opened.pop()
            group.end = mark.start()
            if group.bars:
                found.append(group)
    found.sort(key=lambda group: group.start)
    around: list[int] = []  # ends of the groups that the present one stands in
    for group in found:
        while around and around[-1] < group.start:
            around.pop()
        around.append(group.end)
        if len(around) > MOST_NESTED:
            raise OptionError(
                f"--prompt_alternatives: braces are nested more than {MOST_NESTED} deep. Write the "
                "alternatives into files and use --prompt_wildcards"
            )
    return found
