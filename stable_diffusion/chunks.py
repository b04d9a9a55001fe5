"""Cut the tokens of a text into chunks, which a text encoder reads one by one.

A chunk is up to 75 tokens, between the start and the end token. When the states of several chunks are
joined, the start and end states between them are dropped: n chunks give 75 n + 2 states. Captions of 150
and 225 tokens are laid out like this in training too.
"""
# Letters: K chunks of a text, L tokens

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stable_diffusion.weights import Part

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
    """Return the weights of the joined states: 1 of all that are none of the text's tokens."""
    weights = [1.0]
    for chunk in chunks:
        weights += [*chunk.weights, *[1.0] * (SIZE - len(chunk.ids))]
    return [*weights, 1.0]
