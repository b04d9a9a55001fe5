"""Draw the words of an answer so that it depends only on the seed and the described media."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data_tools.captions.options import AskOptions


def draw_words(ask: AskOptions, names: Sequence[str]) -> list[Any] | None:
    """Return the `logits_processor` for `generate`; None for the most probable words.

    names: of the described media, a row of the batch each.
    """
    return [RowNoise(ask.temperature, ask.seed, names)] if ask.temperature else None


class RowNoise:
    """Adds noise to the scores of the next word, so that the best one is a random draw.

    With Gumbel noise, the largest of `scores / temperature + noise` is a draw from their softmax (Maddison et
    al. 2014, arXiv 1411.0030). Each row has a generator of its own, so that its words depend neither on the
    other rows nor on their number.
    """

    def __init__(self, temperature: float, seed: int, names: Sequence[str]) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator().manual_seed(_seed_of(seed, name)) for name in names]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # scores: B V
        uniform = torch.stack(
            [torch.rand(scores.shape[1], generator=one, dtype=torch.float64) for one in self._generators]
        )
        noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
        return scores.float() / self._temperature + noise.to(scores.device, torch.float32)


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}\n{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little") - 2**63
