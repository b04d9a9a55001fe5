"""Lay out the processes of a run, and exchange the tokens of a clip among them (--context_parallel).

Processes form a grid of micro-batches x passes of a step x tokens of a clip. Neighbors share the tokens,
because they exchange the most data. Groups of them share the passes of a step (--cfg_parallel), and groups of
those have their own micro-batches. A transformer that is split (--shard_base) is spread over all processes.

All processes embed the whole clip; then each takes a consecutive part of the tokens, runs the blocks, and
gathers all parts. For self-attention each process has all tokens in their order but only a part of the heads,
which takes one exchange before it and one after it. Source: Jacobs et al. 2023, arXiv 2309.14509
(DeepSpeed-Ulysses).

The layers before and after the blocks, and the loss, are computed in every process from equal inputs. Each
divides its loss by the number of processes, and gradients are summed over them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from modules.attention.attend import SecondText
from modules.integers import ceil_div
from modules.private_torch import exchange_rows
from runtime.offload.sharding import gather_parts

AXES = ("data", "passes", "context")  # the last one changes fastest


@dataclass(frozen=True)
class ProcessGrid:
    """The numbers of processes that share passes and that share tokens, and the rank of this process."""

    rank: int  # rank of this process, from 0
    data_parallel_size: int  # number of groups with their own micro-batches (`count_groups`)
    passes: int = 1  # number of parts of a group, which share the passes of a step
    context: int = 1  # number of processes of a part, which share the tokens of a clip


def device_mesh(grid: ProcessGrid, device: torch.device) -> DeviceMesh:
    """Create the groups of processes named in `AXES`. All processes must call this."""
    from torch.distributed.device_mesh import init_device_mesh  # not needed by a single process

    return init_device_mesh(
        device.type, (grid.data_parallel_size, grid.passes, grid.context), mesh_dim_names=AXES
    )


@dataclass(frozen=True)
class TokenShard:
    """This process's range of L tokens, which are divided among P processes in runs of equal length.

    The last runs may be shorter or empty.
    """

    length: int  # L
    index: int  # index of this part, from 0
    count: int  # P
    group: Any  # process group, in the order of the parts

    @property
    def size(self) -> int:
        """Return the number of tokens of each part; the last parts may be shorter."""
        return ceil_div(self.length, self.count)

    @property
    def run(self) -> slice:
        """Range of this process's tokens among all tokens of the clip."""
        return slice(min(self.index * self.size, self.length), min((self.index + 1) * self.size, self.length))

    def count_among_first(self, count: int) -> int:
        """Return the number of tokens of this process among the clip's first `count` tokens."""
        return min(max(count - self.run.start, 0), self.run.stop - self.run.start)

    def count_among_last(self, count: int) -> int:
        """Return the number of tokens of this process among the clip's last `count` tokens."""
        return self.run.stop - self.run.start - self.count_among_first(self.length - count)

    def slice_rotary(self, table: Tensor, before: int = 0) -> Tensor:
        """Return the rotary embeddings of this part's tokens; tokens after the table's end are not rotated.

        Args:
            table: Rotary embeddings, ... L' 1 D/2 2, of the tokens after the first `before`.
            before: Number of tokens before the table's first token.
        """
        start, stop = (max(position - before, 0) for position in (self.run.start, self.run.stop))
        return table[..., start:stop, :, :, :]

    def take(self, x: Tensor) -> Tensor:
        """Return this process's tokens of x, B L C."""
        return x[:, self.run]

    def join(self, x: Tensor) -> Tensor:
        """Gather the tokens of all processes: l tokens of this process, B l C, become all, B L C."""
        joined: Tensor = _Join.apply(x, self)
        return joined

    def gather_tokens(self, *heads: Tensor) -> tuple[Tensor, ...]:
        """Exchange this process's tokens of all heads, B l N D, for all tokens of its heads, B L n D each."""
        sent = []
        for tensor in heads:
            by_process = self._fill_up(tensor).unflatten(2, (self.count, -1)).movedim(2, 0)
            sent.append(by_process.contiguous())
        received = _Exchange.apply(self.group.group_name, *sent)  # each P B size n D
        return tuple(tensor.movedim(0, 1).flatten(1, 2)[:, : self.length] for tensor in received)

    def gather_heads(self, attended: Tensor) -> Tensor:
        """Exchange all tokens of this process's heads, B L n D, for all heads of its tokens, B l N D."""
        missing = self.count * self.size - self.length
        if missing:
            attended = pad(attended, (0, 0, 0, 0, 0, missing))
        sent = attended.unflatten(1, (self.count, self.size)).movedim(1, 0).contiguous()
        (received,) = _Exchange.apply(self.group.group_name, sent)  # P B size n D
        return received.movedim(0, 2).flatten(2, 3)[:, : self.run.stop - self.run.start]

    def combine(self, with_first: Tensor, with_second: Tensor, second: SecondText) -> Tensor:
        """Combine the attention to each text, of n heads, for the tokens of this process: B l N D.

        Combining needs all heads of a token.

        Args:
            with_first: Attention of the image's L tokens and the first text's T tokens, B L+T n D.
            with_second: Attention of the image's L tokens and the second text's T' tokens, B L+T' n D.
            second: The second text.
        """
        num_image_tokens = second.num_image_tokens  # image tokens come before text tokens
        # each text's own attention; `gather_heads` takes the tokens of the image and of both texts
        text_attention = torch.cat(
            [with_first[:, num_image_tokens:], with_second[:, num_image_tokens:]], dim=1
        )
        # all heads of this process's tokens
        all_first = self.gather_heads(torch.cat([with_first[:, :num_image_tokens], text_attention], dim=1))
        all_second = self.gather_heads(torch.cat([with_second[:, :num_image_tokens], text_attention], dim=1))
        num_here = self.count_among_first(num_image_tokens)  # image tokens of this process
        steered = second.combine_attention(all_first[:, :num_here], all_second[:, :num_here])
        return torch.cat([steered, all_first[:, num_here:]], dim=1)

    def _fill_up(self, x: Tensor) -> Tensor:
        """Pad B l ... with zeros to B size ..., so that all processes have equal parts."""
        missing = self.size - x.shape[1]
        return pad(x, (*[0, 0] * (x.ndim - 2), 0, missing)) if missing else x


class _Exchange(torch.autograd.Function):
    """Send row i of each tensor, P ..., to process i of a group; return the rows from all processes."""

    @staticmethod
    def forward(ctx: Any, group: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return exchange_rows(tensors, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *exchange_rows([gradient.contiguous() for gradient in gradients], ctx.group)


class _Join(torch.autograd.Function):
    """Gather the tokens of all processes.

    All processes compute equal results from the joined tokens, so the sum of their gradients is one process's
    gradient times their number.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: TokenShard) -> Tensor:
        ctx.part = part
        sent = part._fill_up(x).contiguous()
        joined = sent.new_empty(part.count, *sent.shape)
        gather_parts(joined.view(-1, *sent.shape[1:]), sent, part.group)
        return joined.movedim(0, 1).flatten(1, 2)[:, : part.length]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[:, ctx.part.run] * ctx.part.count, None
