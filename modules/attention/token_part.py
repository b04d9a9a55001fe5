"""The part of a clip's tokens that a process has, and how processes exchange them for attention.

Between attention each process has a run of tokens with all their heads; in it all tokens of a run of heads,
in their whole order. Source: Jacobs et al. 2023, arXiv 2309.14509 (DeepSpeed-Ulysses).
"""
# Letters: B batch, L all tokens, l tokens of this process, P processes, N heads, n = N / P, D head width

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from modules.private_torch import exchange_rows


@dataclass(frozen=True)
class TokenPart:
    """One of P runs of L tokens; all have equal sizes, but the last ones may be shorter or empty."""

    length: int  # L
    index: int  # of this part, from 0
    count: int  # P
    group: Any  # of the processes, in the order of the parts

    @property
    def size(self) -> int:
        """Return the tokens of a part that is not shorter."""
        return -(-self.length // self.count)

    @property
    def run(self) -> slice:
        """Return which tokens these are."""
        return slice(min(self.index * self.size, self.length), min((self.index + 1) * self.size, self.length))

    def of_first(self, count: int) -> int:
        """Return how many of the first `count` tokens are here."""
        return min(max(count - self.run.start, 0), self.run.stop - self.run.start)

    def of_last(self, count: int) -> int:
        """Return how many of the last `count` tokens are here."""
        return self.run.stop - self.run.start - self.of_first(self.length - count)

    def rows(self, table: Tensor, before: int = 0) -> Tensor:
        """Return the rotations of these tokens; those behind the table have none.

        table: ... L' 1 D/2 2, of tokens behind the first `before`.
        """
        start, stop = (max(place - before, 0) for place in (self.run.start, self.run.stop))
        return table[..., start:stop, :, :, :]

    def take(self, x: Tensor) -> Tensor:
        """Return these tokens of B L C, in memory of their own."""
        return x[:, self.run].clone()

    def join(self, x: Tensor) -> Tensor:
        """Return the tokens of all processes, B L C, of those here, B l C."""
        joined: Tensor = _Join.apply(x, self)
        return joined

    def gather_tokens(self, *heads: Tensor) -> tuple[Tensor, ...]:
        """Return all tokens of this process' heads, each B L n D, of all heads of its tokens, B l N D."""
        sent = (self._fill_up(one).unflatten(2, (self.count, -1)).movedim(2, 0).contiguous() for one in heads)
        received = [exchange_rows(one, self.group) for one in sent]  # P B size n D, all on their way at once
        return tuple(one.movedim(0, 1).flatten(1, 2)[:, : self.length] for one in received)

    def gather_heads(self, seen: Tensor) -> Tensor:
        """Return all heads of this process' tokens, B l N D, of all tokens of its heads, B L n D."""
        missing = self.count * self.size - self.length
        whole = functional.pad(seen, (0, 0, 0, 0, 0, missing)) if missing else seen
        sent = whole.unflatten(1, (self.count, self.size)).movedim(1, 0).contiguous()
        received = exchange_rows(sent, self.group)  # P B size n D
        return received.movedim(0, 2).flatten(2, 3)[:, : self.run.stop - self.run.start]

    def _fill_up(self, x: Tensor) -> Tensor:
        """Return B size ... of B l ..., with zeros behind it."""
        missing = self.size - x.shape[1]
        return functional.pad(x, (*[0, 0] * (x.ndim - 2), 0, missing)) if missing else x


class _Join(torch.autograd.Function):
    """All processes compute the same of the joined tokens, so that each knows the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: TokenPart) -> Tensor:
        ctx.part = part
        sent = part._fill_up(x).contiguous()
        joined = sent.new_empty(part.count, *sent.shape)
        distributed.all_gather_into_tensor(joined.view(-1, *sent.shape[1:]), sent, group=part.group)
        return joined.movedim(0, 1).flatten(1, 2)[:, : part.length]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[:, ctx.part.run] * ctx.part.count, None
