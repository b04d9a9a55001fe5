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
    """An opening run of braces, and the text that follows it so far."""

    num_braces: int  # number of braces that have not been closed
    pieces: list[str] = field(default_factory=list)  # the text so far, in which inner choices are drawn


@dataclass(frozen=True)
class FilledText:
    """A caption with its {a|b} choices drawn; `has_lone_brace`: a brace belongs to no choice."""

    text: str
    has_lone_brace: bool


def fill_wildcards(text: str, generator: random.Random) -> FilledText:
    """Draw one alternative of each `{a|b}`, from the inside out.

    1. An opening brace puts an open choice on a stack; texts are added to the innermost one.
    2. A closing brace takes it off the stack, and adds the drawn alternative to the one around it.
    3. Braces that are still open at the end are added as text.

    `{{` and `}}` stand for the braces themselves, as in sd-scripts, unless one of the two braces closes or
    opens a choice around another one: `{{a|b} c|d}`, `{a|b {c|d}}`.
    """
    open_choices = [_OpenChoice(0)]  # a stack; the first element is the text outside of all braces
    num_lone = 0
    for piece in _BRACES.split(text):  # runs of equal braces, and the texts between them
        if piece.startswith("{") and len(open_choices) > _MAX_NESTED:
            num_lone += 1
            open_choices[-1].pieces.append(piece)
        elif piece.startswith("{"):
            open_choices.append(_OpenChoice(len(piece)))
        elif piece.startswith("}"):
            num_lone += _close_choices(open_choices, len(piece), generator)
        else:
            open_choices[-1].pieces.append(piece)
    while len(open_choices) > 1:  # braces that are never closed: no choice is drawn
        choice = open_choices.pop()
        num_lone += choice.num_braces % 2  # two braces make a literal one, an odd brace stands alone
        open_choices[-1].pieces += ["{" * _count_literal(choice.num_braces), *choice.pieces]
    return FilledText("".join(open_choices[0].pieces).replace(_BAR, "|"), num_lone > 0)


def has_choice(text: str) -> bool:
    """Return whether a caption contains a {a|b} choice."""
    return _CHOICE.search(text) is not None


def _close_choices(open_choices: list[_OpenChoice], num_closing: int, generator: random.Random) -> int:
    """Draw from the {a|b} choices that a run of `num_closing` closing braces ends, innermost first."""
    # Each open choice takes as many of these braces as it has opening ones. `{{{a|b}}}` has one choice and a
    # pair of literal braces.
    while num_closing and len(open_choices) > 1:
        choice = open_choices[-1]
        num_matched = min(choice.num_braces, num_closing)  # braces on both sides of the choice's content
        content = "".join(choice.pieces)
        if num_matched % 2:  # each pair of braces is literal; the odd one encloses a choice
            content = generator.choice(content.split("|"))
        else:  # no choice: its bars must not split the choice around it
            content = content.replace("|", _BAR)
        num_pairs = num_matched // 2
        choice.pieces = ["{" * num_pairs, content, "}" * num_pairs]
        choice.num_braces -= num_matched
        num_closing -= num_matched
        if not choice.num_braces:
            open_choices.pop()
            open_choices[-1].pieces += choice.pieces
    open_choices[-1].pieces.append("}" * _count_literal(num_closing))
    return num_closing % 2


def _count_literal(num_braces: int) -> int:
    """Return how many literal braces a run of braces means: `{{` means one, and a single `{` as well."""
    return (num_braces + 1) // 2
