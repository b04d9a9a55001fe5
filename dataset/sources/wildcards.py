"""Choices in captions: `a {red|blue} coat`, of which enable_wildcard draws one in each training step."""

import random
import re
from dataclasses import dataclass, field

_CHOICE = re.compile(r"\{[^{}]*\|[^{}]*\}")
_BRACES = re.compile(r"(\{++|\}++)")
_MAX_NESTED = 100  # depth of nested choices, because the time grows with its square
_BAR = "\0"  # stands for a literal bar; no caption contains this character


@dataclass
class _OpenChoice:
    """Opening braces at one position, and the text that follows them."""

    opened: int  # number of braces that have not been closed
    pieces: list[str] = field(default_factory=list)  # the text so far, in which inner choices are drawn


@dataclass(frozen=True)
class FilledText:
    """A caption with its choices drawn; `has_lone_brace` says that a brace belongs to no choice."""

    text: str
    has_lone_brace: bool


def fill_wildcards(text: str, generator: random.Random) -> FilledText:
    """Draw one alternative of each `{a|b}`, from the inside out.

    `{{` and `}}` stand for the braces themselves, as in sd-scripts, unless one of the two braces closes or
    opens a choice around another one: `{{a|b} c|d}`, `{a|b {c|d}}`.
    """
    groups = [_OpenChoice(0)]  # a stack; the first element is the text outside of all braces
    num_lone = 0
    for piece in _BRACES.split(text):  # runs of equal braces, and the texts between them
        if piece.startswith("{") and len(groups) > _MAX_NESTED:
            num_lone += 1
            groups[-1].pieces.append(piece)
        elif piece.startswith("{"):
            groups.append(_OpenChoice(len(piece)))
        elif piece.startswith("}"):
            num_lone += _close(groups, len(piece), generator)
        else:
            groups[-1].pieces.append(piece)
    while len(groups) > 1:  # braces that are never closed: no choice is drawn
        group = groups.pop()
        num_lone += group.opened % 2  # two braces are a literal one, an odd brace is alone
        groups[-1].pieces += ["{" * _count_literal(group.opened), *group.pieces]
    return FilledText("".join(groups[0].pieces).replace(_BAR, "|"), num_lone > 0)


def has_choice(text: str) -> bool:
    """Return whether a caption has a choice to draw."""
    return _CHOICE.search(text) is not None


def _close(groups: list[_OpenChoice], closed: int, generator: random.Random) -> int:
    """Draw the choices that `closed` closing braces end; return the number of braces left over."""
    # each run of opening braces takes as many of the closing ones as it has
    while closed and len(groups) > 1:
        group = groups[-1]
        matched = min(group.opened, closed)  # braces on both ends of this content
        content = "".join(group.pieces)
        if matched % 2:  # each pair of braces is literal; the odd one encloses a choice
            content = generator.choice(content.split("|"))
        else:  # no choice: its bars must not divide a choice around it
            content = content.replace("|", _BAR)
        num_pairs = matched // 2
        group.pieces = ["{" * num_pairs, content, "}" * num_pairs]
        group.opened -= matched
        closed -= matched
        if not group.opened:
            groups.pop()
            groups[-1].pieces += group.pieces
    groups[-1].pieces.append("}" * _count_literal(closed))
    return closed % 2


def _count_literal(num_braces: int) -> int:
    """Return the number of literal braces in a run: two stand for one, and a single one for itself."""
    return (num_braces + 1) // 2
