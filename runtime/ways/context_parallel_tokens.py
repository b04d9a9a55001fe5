"""Run the blocks of a transformer on a part of the tokens of a clip.

How tokens are exchanged is in `runtime/offload/context.py`.
"""

import functools
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import pad

from modules.errors import OptionError
from protocols.steps import Overrides
from runtime.offload.context import ProcessGrid, TokenShard, device_mesh
from runtime.offload.sharding import TOKEN_GROUP, TOKEN_PART
from runtime.run_blocks import Hidden, Runner, get_runner, get_spec, set_runner


def share_tokens(network: nn.Module, grid: ProcessGrid, device: torch.device) -> None:
    """Make the network's blocks run on this process's part of the tokens.

    Call it last, in all processes.

    Raises:
        OptionError: If the heads cannot be divided among the processes.
    """
    config: Any = network.config
    heads: int = config.num_heads
    if heads % grid.context:
        fitting = [str(count) for count in range(2, heads + 1) if heads % count == 0]
        raise OptionError(
            f"--context_parallel {grid.context}: each process computes an equal part of the {heads} heads of "
            f"this transformer's attention. Pass {' or '.join(fitting) or 1}"
        )
    group = device_mesh(grid, device).get_group("context")
    set_runner(network, functools.partial(_run_part, get_runner(network), group))
    setattr(network, TOKEN_GROUP, group)
    # a LoRA's neuron dropout reads this attribute, so that each process's tokens get their own mask
    index_in_group = grid.rank % grid.context
    for block in chain.from_iterable(get_spec(network).blocks(network).values()):
        for layer in block.modules():
            setattr(layer, TOKEN_PART, index_in_group)


def _run_part(
    inner: Runner, group: distributed.ProcessGroup, dit: nn.Module, hidden: Hidden, overrides: Overrides
) -> None:
    """Run the blocks on this process's part of the tokens; before and after, `hidden` has all tokens."""
    all_tokens, all_residuals = hidden.tokens, hidden.block_residuals
    all_text_residuals, num_tokens = hidden.text_residuals, hidden.x.shape[1]
    # lengths of the token streams; if there are several, `all_tokens` has them
    lengths = getattr(all_tokens, "stream_lengths", (hidden.x.shape[1],))
    shards = [TokenShard(length, group.rank(), group.size(), group) for length in lengths]
    hidden.x = _take_parts(shards, hidden.x, lengths)
    hidden.tokens = all_tokens.cut(*shards)
    hidden.block_residuals = [None if tensor is None else shards[0].take(tensor) for tensor in all_residuals]
    # padded to all tokens, so that each process takes its own
    hidden.text_residuals = [
        shards[0].take(pad(tensor, (0, 0, num_tokens - tensor.shape[1], 0))) for tensor in all_text_residuals
    ]
    if hidden.control_tokens is not None:
        hidden.control_tokens = shards[0].take(hidden.control_tokens)
    inner(dit, hidden, overrides)
    # the layers after the blocks compute on complete tokens again
    hidden.x = _join_parts(shards, hidden.x)
    hidden.tokens = all_tokens
    hidden.block_residuals = all_residuals
    hidden.text_residuals = all_text_residuals


def _take_parts(parts: Sequence[TokenShard], x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return this process's tokens of x, B L C, which joins several streams of the given lengths."""
    streams = x.split(list(lengths), dim=1)
    return torch.cat([part.take(stream) for part, stream in zip(parts, streams, strict=True)], dim=1)


def _join_parts(parts: Sequence[TokenShard], x: Tensor) -> Tensor:
    """Gather the tokens of each stream from all processes; x, B l C, joins this process's tokens of them."""
    streams = x.split([part.count_among_first(part.length) for part in parts], dim=1)
    joined = [part.join(stream) for part, stream in zip(parts, streams, strict=True)]
    return joined[0] if len(joined) == 1 else torch.cat(joined, dim=1)
