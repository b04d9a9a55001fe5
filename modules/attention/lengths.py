"""Attention over batches whose samples have different numbers of tokens, without computing the padding."""
# Letters: B batch, L tokens with padding, T real tokens of all samples together, N heads, D head width

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from modules.devices import numbers_on

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]  # query B L N D, key and value B S N D -> B L N D


@dataclass(frozen=True)
class Lengths:
    """Number of real tokens of each sample; padding follows them.

    Made once per forward pass by `lengths_on`.
    """

    # B numbers on the host: reading them from the device in every layer would make the host wait
    counts: tuple[int, ...]
    # B + 1 int32: where each sample begins once the real tokens are concatenated, and where the last ends
    starts: Tensor

    @property
    def longest(self) -> int:
        return max(self.counts)


def lengths_on(counts: Sequence[int], device: torch.device) -> Lengths:
    """Make the `Lengths` of a batch. counts: how many tokens of each sample are real, each at least 1."""
    starts = numbers_on(device, [0, *accumulate(counts)], torch.int32)
    return Lengths(tuple(counts), starts)


def pack(tokens: Tensor, lengths: Lengths) -> Tensor:
    """Concatenate the real tokens of B L N D to T N D."""
    # unbind: the gradient of a slice of the batch would be a batch of zeros for each sample
    return torch.cat([sample[:count] for sample, count in zip(tokens.unbind(0), lengths.counts, strict=True)])


def unpack(packed: Tensor, lengths: Lengths, length: int) -> Tensor:
    """Undo `pack`: T N D to B `length` N D, with zeros in the padding."""
    return _fill_up(packed.split(lengths.counts), length)


def attend_by_sample(
    dense: Dense, query: Tensor, key: Tensor, value: Tensor, lengths: Lengths | None = None
) -> Tensor:
    """Run `dense` on one sample at a time, over its real tokens only. Returns zeros in the padding."""
    counts: Sequence[int | None] = [None] * len(query) if lengths is None else lengths.counts
    samples = zip(query.unbind(0), key.unbind(0), value.unbind(0), counts, strict=True)
    parts = [dense(q[None, :count], k[None, :count], v[None, :count])[0] for q, k, v, count in samples]
    return torch.stack(parts) if lengths is None else _fill_up(parts, query.shape[1])


def _fill_up(samples: Sequence[Tensor], length: int) -> Tensor:
    """Pad samples (n N D) to one B `length` N D. One concatenation, so that real tokens are copied once."""
    pieces = [piece for one in samples for piece in (one, one.new_zeros(length - len(one), *one.shape[1:]))]
    return torch.cat(pieces).unflatten(0, (len(samples), length))
