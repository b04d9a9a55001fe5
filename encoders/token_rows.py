"""Rows of token ids: padded to one length, and checked against what an encoder knows."""
# Letters: B prompts, L tokens

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from modules.errors import CheckpointError


def fill_rows(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, each B L int64, with the rows padded on the right."""
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
    mask = torch.tensor([[*[1] * len(row), *[0] * (length - len(row))] for row in rows])
    return ids, mask


def check_ids(ids: Tensor, known: int, path: Path, option: str) -> None:
    """Raise CheckpointError if a tokenizer has more tokens than its encoder, in `path`, knows.

    option: of the tokenizer.
    """
    largest = int(ids.max())
    if largest >= known:
        raise CheckpointError(
            f"{path} knows {known} tokens, but its tokenizer has more (token {largest}). "
            f"Give the tokenizer of this model to {option}.",
            path,
        )
