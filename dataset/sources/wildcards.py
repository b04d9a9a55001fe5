"""Choices in captions: `a {red|blue} coat`, which enable_wildcard draws each time a picture is trained."""

import random
import re
from dataclasses import dataclass, field

_CHOICE = re.compile(r"\{[^{}]*\|[^{}]*\}")
_BRACES = re.compile(r"(\{++|\}++)")
_MAX_NESTED = 100  # choices in one another; a limit on time, which grows with its square
_BAR = "\0"  # stands for a bar that is literal; no caption holds this character


@dataclass
class _OpenChoice:
    """Opening braces at one position, and the text after them so far, with its choices drawn."""

    opened: int
    pieces: list[str] = field(default_factory=list)


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
    groups = [_OpenChoice(0)]  # the first is the text outside of all braces
    lone_braces = 0
    for piece in _BRACES.split(text):
        if piece.startswith("{") and len(groups) > _MAX_NESTED:
            lone_braces += 1
            groups[-1].pieces.append(piece)
        elif piece.startswith("{"):
            groups.append(_OpenChoice(len(piece)))
        elif piece.startswith("}"):
            lone_braces += _close(groups, len(piece), generator)
        else:
            groups[-1].pieces.append(piece)
    while len(groups) > 1:  # opened, and closed nowhere: no choice is drawn
        group = groups.pop()
        lone_braces += group.opened % 2
        groups[-1].pieces += ["{" * _literal(group.opened), *group.pieces]
    return FilledText("".join(groups[0].pieces).replace(_BAR, "|"), lone_braces > 0)


def has_choice(text: str) -> bool:
    """Return whether a caption has a choice to draw."""
    return _CHOICE.search(text) is not None


def _close(groups: list[_OpenChoice], closed: int, generator: random.Random) -> int:
    """Draw the choices that `closed` closing braces end; return the number of braces that end no choice."""
    while closed and len(groups) > 1:
        group = groups[-1]
        matched = min(group.opened, closed)
        content = "".join(group.pieces)
        if matched % 2:  # pairs of braces stand for braces; the odd one is that of a choice
            content = generator.choice(content.split("|"))
        else:  # no choice: its bars are kept from the choice around it
            content = content.replace("|", _BAR)
        pairs = matched // 2
        group.pieces = ["{" * pairs, content, "}" * pairs]
        group.opened -= matched
        closed -= matched
        if not group.opened:
            groups.pop()
            groups[-1].pieces += group.pieces
    groups[-1].pieces.append("}" * _literal(closed))
    return closed % 2


def _literal(braces: int) -> int:
    """Return how many braces a run stands for: two stand for one, and a single one for itself."""
    return (braces + 1) // 2
