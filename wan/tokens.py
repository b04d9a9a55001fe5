"""Inputs of the Wan transformer's blocks besides the video tokens: texts, times, positions."""
# Letters: B batch, L video tokens, S segments of them, T text tokens, I image tokens, C width

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from modules.attention.options import SDPA, AttentionChoice


@dataclass(frozen=True)
class WanText:
    """A text as cross-attention takes it."""

    rows: Tensor  # B T C
    repeats: Tensor | None = None  # T float32, for how many equal rows each row stands; None: one each


@dataclass(frozen=True)
class WanTokens:
    """Inputs of the blocks besides the video tokens; built once per forward pass by `WanModel.embed`."""

    grid: tuple[int, int, int]  # tokens along frames, rows, columns; L is their product
    rotary: Tensor  # turns by position, L 1 D/2 2 in the model's `precision`
    texts: tuple[WanText, ...]  # usually one
    image: Tensor | None  # B I C
    time: Tensor  # B S C in the model's `precision`
    modulation: Tensor  # B S 6 C likewise
    given: int  # tokens in front that hold clean frames; S is 2 where there are such
    dtype: torch.dtype  # of activations between layers
    attention: AttentionChoice
    combine: Callable[..., Tensor]  # of what attention sees of each text, B L N D


def see_one(seen: Tensor) -> Tensor:
    """Return the attention to the only text."""
    return seen


def pad_texts(
    text: Sequence[Tensor] | Tensor, length: int, attention: AttentionChoice | None
) -> tuple[Tensor, Tensor | None]:
    """Stack texts of any length to B T text_dim, padded with zeros, which are unmasked as in training.

    On a CPU, if `attention` can repeat keys, the rows that are zero in every sample are merged into one, and
    T numbers say how many rows each row stands for. The layers before attention treat each row separately, so
    the result is the same, and most of a small model's work is saved. On a GPU 512 rows cost next to nothing,
    and kernels want the weights of keys in 16 bits, which cannot tell 505 rows from 508.
    """
    longest = max(len(rows) for rows in text)
    if longest > length:
        raise ValueError(f"a text has {longest} tokens, the model takes {length}")
    merges = attention is not None and attention.mode == SDPA.mode and text[0].device.type == "cpu"
    size = min(longest + 1, length) if merges else length
    rows = torch.stack([functional.pad(rows, (0, 0, 0, size - len(rows))) for rows in text])
    if size == length:
        return rows, None
    repeats = torch.ones(size, device=rows.device)
    repeats[-1] = length - longest
    return rows, repeats
