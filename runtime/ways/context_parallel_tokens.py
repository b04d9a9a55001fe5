"""Run the blocks of a transformer on a part of the tokens of a clip.

How tokens are exchanged is in `runtime/offload/context.py`.
"""

import functools
from itertools import chain
from typing import Any

import torch
from torch import Tensor, distributed, nn

from modules.errors import OptionError
from protocols.steps import Overrides
from runtime.offload.context import ProcessGrid, TokenPart, device_mesh
from runtime.offload.sharding import TOKEN_GROUP, TOKEN_PART
from runtime.run_blocks import Hidden, Runner, runner_of, set_runner, spec_of


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
            f"this transformer's attention. Give {' or '.join(fitting) or 1}"
        )
    group = device_mesh(grid, device).get_group("context")
    set_runner(network, functools.partial(_run_part, runner_of(network), group))
    setattr(network, TOKEN_GROUP, group)
    # a LoRA's neuron dropout reads it, so that each part of the tokens has its own mask
    for block in chain.from_iterable(spec_of(network).blocks(network).values()):
        for layer in block.modules():
            setattr(layer, TOKEN_PART, grid.rank % grid.context)  # index of the process in its group


def _run_part(
    inner: Runner, group: distributed.ProcessGroup, dit: nn.Module, hidden: Hidden, overrides: Overrides
) -> None:
    """Run the blocks on this process's part of the tokens with the previous runner."""
    # the blocks' other inputs; for each block, what is added to its result
    tokens, block_residuals = hidden.tokens, hidden.block_residuals
    # lengths of the streams of tokens; if there are several, the record of tokens states them
    lengths = getattr(tokens, "stream_lengths", (hidden.x.shape[1],))
    parts = [TokenPart(length, group.rank(), group.size(), group) for length in lengths]
    own_parts = []
    for part, stream in zip(parts, hidden.x.split(lengths, dim=1), strict=True):
        own_parts.append(part.take(stream))
    hidden.x = torch.cat(own_parts, dim=1)
    hidden.tokens = tokens.cut(*parts)
    added_here: list[Tensor | None] = []
    for tensor in block_residuals:
        added_here.append(None if tensor is None else parts[0].take(tensor))
    hidden.block_residuals = added_here
    if hidden.control_tokens is not None:  # input of the side blocks: tokens of the first stream
        hidden.control_tokens = parts[0].take(hidden.control_tokens)
    inner(dit, hidden, overrides)
    # the layers after the blocks compute on complete tokens again
    hidden.block_residuals = block_residuals
    lengths_here = [part.of_first(part.length) for part in parts]
    joined = []
    for part, stream in zip(parts, hidden.x.split(lengths_here, dim=1), strict=True):
        joined.append(part.join(stream))
    hidden.x = joined[0] if len(joined) == 1 else torch.cat(joined, dim=1)
    hidden.tokens = tokens
