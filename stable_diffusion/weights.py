"""Read the weights in a prompt: `a (red:1.4) [old] car`, and where BREAK begins a new chunk of tokens.

`(x)` weighs 1.1, `[x]` 1 / 1.1, `(x:1.3)` 1.3; nested weights multiply. `\\( \\) \\[ \\] \\\\` are the
characters themselves. Brackets that are open at the end are closed there; those that close nothing are
plain text. Round and square brackets are paired apart from each other. Standard library only.
"""

import re
from dataclasses import dataclass

USUAL = 1.1  # of (x)
MOST = 1000.0  # larger products would overflow float16
_MARKS = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|(?P<bracket>[()\[\]])"
    r"|:[ \t]*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))[ \t]*\)"
    r"|(?P<chunk>\bBREAK\b)"
)


@dataclass(frozen=True)
class Part:
    """A part of a prompt whose tokens have one weight."""

    text: str
    weight: float = 1.0
    begins_chunk: bool = False  # BREAK stands in front of it


@dataclass(eq=False)
class _Bracket:
    """A pair of brackets, whose weight may be told where it closes."""

    is_round: bool
    weight: float

    @staticmethod
    def opened_by(character: str) -> "_Bracket":
        return _Bracket(True, USUAL) if character == "(" else _Bracket(False, 1 / USUAL)


# What a prompt consists of, in order: a text, a bracket that opens (True) or closes (False), BREAK (None).
_Event = str | tuple[_Bracket, bool] | None


def parse_weights(text: str) -> tuple[Part, ...]:
    """Return the parts of a prompt, without marks and without empty parts.

    Neighbours of equal weight are one part, so that a text without marks is one part: itself. Takes time in
    proportion to the length. Raises nothing.
    """
    parts: list[Part] = []
    products = {True: [1.0], False: [1.0]}  # of the open brackets, for each kind
    begins_chunk = False
    for event in _events(text):
        if event is None:
            begins_chunk = True
        elif isinstance(event, str):
            weight = max(-MOST, min(MOST, products[True][-1] * products[False][-1]))
            if parts and parts[-1].weight == weight and not begins_chunk:
                parts[-1] = Part(parts[-1].text + event, weight, parts[-1].begins_chunk)
            else:
                parts.append(Part(event, weight, begins_chunk))
            begins_chunk = False
        else:
            bracket, opens = event
            open_products = products[bracket.is_round]
            if opens:
                open_products.append(max(-MOST, min(MOST, open_products[-1] * bracket.weight)))
            else:
                open_products.pop()
    return tuple(parts)


def _events(text: str) -> list[_Event]:
    events: list[_Event] = []
    stacks: dict[bool, list[_Bracket]] = {True: [], False: []}  # what is open: round, square
    place = 0
    for mark in _MARKS.finditer(text):
        if mark.start() > place:
            events.append(text[place : mark.start()])
        place = mark.end()
        events.extend(_read_mark(mark, stacks))
    if place < len(text):
        events.append(text[place:])
    return events


def _read_mark(mark: re.Match[str], stacks: dict[bool, list[_Bracket]]) -> list[_Event]:
    """Return what a mark stands for. stacks: open brackets, which it changes."""
    if mark["chunk"]:
        return [None]
    if mark["escaped"]:
        return [mark["escaped"]]
    if mark["bracket"] in ("(", "["):
        bracket = _Bracket.opened_by(mark["bracket"])
        stacks[bracket.is_round].append(bracket)
        return [(bracket, True)]
    stack = stacks[mark["bracket"] != "]"]
    if not stack:
        return [mark[0]]
    bracket = stack.pop()
    if mark["number"]:
        # float() of too many digits is infinite, which is no weight
        bracket.weight = max(-MOST, min(MOST, float(mark["number"])))
    return [(bracket, False)]
