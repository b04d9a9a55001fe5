"""Weights of a prompt's parts, applied to a text encoder's outputs for its tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor


def weigh_rows(rows: Tensor | list[Tensor], weights: Sequence[float]) -> Tensor:
    """Multiply the first rows by their weights; the others stay as they are.

    rows: L C, of one prompt. weights: of the prompt's tokens, at most L. The product is computed in float32
    and rounded once, so that rows of weight 1 keep every bit.
    """
    assert isinstance(rows, Tensor)
    weighed = rows.clone()
    factors = torch.tensor(weights, dtype=torch.float32, device=rows.device)[:, None]
    weighed[: len(weights)] = (rows[: len(weights)].float() * factors).to(rows.dtype)
    return weighed
