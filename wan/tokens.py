"""What the blocks of the Wan transformer get besides the video tokens: text, times, positions."""
# Letters: B batch, L video tokens, T text tokens, I image tokens, D head width, C width of the model

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from modules.attention.options import AttentionChoice
from modules.contract.generation import Steer


@dataclass(frozen=True)
class AwayText:
    """A second text, from which the attention to the first one is steered away."""

    rows: Tensor  # B T C
    repeats: Tensor | None  # as `WanTokens.text_repeats`
    steer: Steer


@dataclass(frozen=True)
class GivenTokens:
    """Tokens in front of the others that hold clean frames: they have a time of their own, 0."""

    count: int
    time: Tensor  # 1 C
    modulation: Tensor  # 1 6 C


@dataclass(frozen=True)
class WanTokens:
    """Inputs of the blocks besides the video tokens; built once per forward pass by `WanModel.embed`."""

    grid: tuple[int, int, int]  # tokens along frames, rows, columns; L is their product
    rotary: Tensor  # turns by position, L 1 D/2 2 in the model's `precision`
    text: Tensor  # B T C
    text_repeats: Tensor | None  # T float32, for how many equal rows each row of text stands; None: one each
    image: Tensor | None  # B I C
    time: Tensor  # B C in the model's `precision`
    modulation: Tensor  # B 6 C likewise, the same for all tokens that are not given
    dtype: torch.dtype  # of activations between layers
    attention: AttentionChoice
    away: AwayText | None = None
    given: GivenTokens | None = None

    def each_part(
        self, compute: Callable[..., Tensor], parts: Sequence[Sequence[Tensor]], *rows: Tensor
    ) -> Tensor:
        """Return `compute(*rows, *parts[0])`, B L C', for rows B L C; with given tokens these by themselves.

        parts: what belongs to the time of the tokens, first of those that are not given, then of the given.
        Joining two results takes no more memory than a result that was not rounded to `dtype` yet.
        """
        if self.given is None:
            return compute(*rows, *parts[0])
        count = self.given.count
        front = compute(*(each[:, :count] for each in rows), *parts[1])
        return torch.cat([front, compute(*(each[:, count:] for each in rows), *parts[0])], dim=1)


def pad_texts(text: Sequence[Tensor] | Tensor, length: int, merges: bool) -> tuple[Tensor, Tensor | None]:
    """Stack texts of any length to B T text_dim, padded with zeros, which are unmasked as in training.

    merges: merge the rows that are zero in every sample into one, and return T numbers that say how many rows
    each row stands for. The layers before attention treat each row separately, so the result is the same. On
    a CPU this saves most of a small model's work. On a GPU 512 rows cost next to nothing, and kernels want
    the weights of keys in 16 bits, which cannot tell 505 rows from 508.
    """
    longest = max(len(rows) for rows in text)
    if longest > length:
        raise ValueError(f"a text has {longest} tokens, the model takes {length}")
    size = min(longest + 1, length) if merges else length
    rows = torch.stack([functional.pad(rows, (0, 0, 0, size - len(rows))) for rows in text])
    if size == length:
        return rows, None
    repeats = torch.ones(size, device=rows.device)
    repeats[-1] = length - longest
    return rows, repeats
