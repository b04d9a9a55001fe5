"""Cut the tokens of a text into chunks, which a text encoder reads one by one.

A chunk is up to 75 tokens, between the start and the end token. When the states of several chunks are
joined, the start and end states between them are dropped: n chunks give 75 n + 2 states. Captions of 150
and 225 tokens are laid out like this in training too.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Read the weights in a prompt: `a (red:1.4) [old] car`, and where BREAK begins a new chunk of tokens.
#
# `(x)` weighs 1.1, `[x]` 1 / 1.1, `(x:1.3)` 1.3; nested weights multiply. `\( \) \[ \] \\` are the
# characters themselves. Brackets that are open at the end are closed there; those that close nothing are
# plain text. Round and square brackets are paired apart from each other.
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
    """A pair of brackets; its end may give the weight."""

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
    """Return the meaning of a mark. stacks: open brackets, which it changes."""
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


SIZE = 75  # tokens of a chunk
Tokenize = Callable[[str], list[int]]  # however many, without start and end


@dataclass(frozen=True)
class Chunk:
    """Up to 75 tokens and the weight of each."""

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class ChunkRows:
    """Chunks as a text encoder takes them."""

    ids: Tensor  # K 77
    ends: Tensor  # K; where the first end token of each stands


def cut_into_chunks(parts: Sequence[Part], tokenize: Tokenize) -> list[Chunk]:
    """Return the chunks of a text, at least one. BREAK begins a new one, unless one has just begun."""
    chunks: list[tuple[list[int], list[float]]] = [([], [])]
    for part in parts:
        if part.begins_chunk and chunks[-1][0]:
            chunks.append(([], []))
        for token in tokenize(part.text):
            if len(chunks[-1][0]) == SIZE:
                chunks.append(([], []))
            chunks[-1][0].append(token)
            chunks[-1][1].append(part.weight)
    if len(chunks) > 1 and not chunks[-1][0]:  # nothing but blanks behind BREAK
        chunks.pop()
    return [Chunk(tuple(ids), tuple(weights)) for ids, weights in chunks]


def cut_text(parts: Sequence[Part], tokenize: Tokenize, most: int) -> str:
    """Return the end of a text that does not fit into `most` chunks, in whole words. Tokenizes many times."""
    for index, part in enumerate(parts):
        if len(cut_into_chunks(parts[: index + 1], tokenize)) <= most:
            continue
        words = part.text.split()
        fits, too_many = 0, len(words)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            start = Part(" ".join(words[:middle]), begins_chunk=part.begins_chunk)
            if len(cut_into_chunks([*parts[:index], start], tokenize)) <= most:
                fits = middle
            else:
                too_many = middle
        return " ".join([*words[fits:], *(word for rest in parts[index + 1 :] for word in rest.text.split())])
    return ""


def make_rows(chunks: Sequence[Chunk], start: int, end: int, pad: int) -> ChunkRows:
    """Return chunks between start and end tokens, filled up with `pad`, which is `end` or another token."""
    rows = [[start, *chunk.ids, end] + [pad] * (SIZE - len(chunk.ids)) for chunk in chunks]
    # the end of the text, unless it writes <|endoftext|> itself
    return ChunkRows(torch.tensor(rows), torch.tensor([row.index(end) for row in rows]))


def join_states(states: Tensor) -> Tensor:
    """Return K 77 C, the states of all chunks, as one row of 75 K + 2 states."""
    return torch.cat([states[0, :1], *(chunk[1:-1] for chunk in states), states[-1, -1:]])


def join_weights(chunks: Sequence[Chunk]) -> list[float]:
    """Return the weights of the joined states: 1 for all but the text's tokens."""
    weights = [1.0]
    for chunk in chunks:
        weights += [*chunk.weights, *[1.0] * (SIZE - len(chunk.ids))]
    return [*weights, 1.0]
