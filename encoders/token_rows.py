"""Rows of token ids: padded to one length, and checked against an encoder's vocabulary."""
# Letters: B prompts, L tokens

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modules.errors import CheckpointError

TOKENS_AT_ONCE = 4096  # bounds memory when many prompts are given


def fill_rows(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, each B L int64, with the rows padded on the right."""
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
    mask = torch.tensor([[*[1] * len(row), *[0] * (length - len(row))] for row in rows])
    return ids, mask


def check_ids(rows: Sequence[Sequence[int]], known: int, path: Path, option: str) -> None:
    """Raise CheckpointError if a tokenizer has more tokens than its encoder, in `path`, knows.

    rows: token ids of texts. option: of the tokenizer.
    """
    largest = max((max(row) for row in rows), default=0)
    if largest >= known:
        raise CheckpointError(
            f"{path} knows {known} tokens, but its tokenizer has more (token {largest}). "
            f"Give the tokenizer of this model to {option}.",
            path,
        )


def in_groups(prompts: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Yield the prompts in order, in groups of at most TOKENS_AT_ONCE tokens."""
    group: list[list[int]] = []
    for prompt in prompts:
        if group and sum(map(len, group)) + len(prompt) > TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group
