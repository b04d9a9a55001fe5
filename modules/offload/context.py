"""Share the tokens of a clip among processes: each runs the blocks on a part of them (--context_parallel).

All processes embed the whole clip; then each takes its part, runs the blocks, with an exchange around every
attention among tokens (`modules.attention.token_part`), and gathers the parts of all. So what is before and
behind the blocks is computed in every process, of equal inputs, and so is the loss. Each divides its loss by
the number of processes, and gradients are summed over them.
"""

import functools
from itertools import chain

import torch
from torch import distributed, nn

from modules.attention.token_part import TokenPart
from modules.contract.steps import Tweaks
from modules.errors import OptionError
from modules.offload.mesh import ProcessGrid, device_mesh
from modules.offload.sharding import TOKEN_GROUP, TOKEN_PART
from modules.run_blocks import Hidden, Runner, runner_of, set_runner, spec_of


def share_tokens(network: nn.Module, grid: ProcessGrid, device: torch.device) -> None:
    """Make the network's blocks run on a part of the tokens. Call it last, in all processes.

    Raises OptionError if the heads cannot be divided among them.
    """
    heads = network.config.num_heads  # type: ignore[union-attr]
    if heads % grid.context:
        fitting = [str(count) for count in range(2, heads + 1) if heads % count == 0]  # type: ignore[operator]
        raise OptionError(
            f"--context_parallel {grid.context}: each process computes an equal part of the {heads} heads of "
            f"this transformer's attention. Give {' or '.join(fitting) or 1}"
        )
    group = device_mesh(grid, device).get_group("context")
    set_runner(network, functools.partial(_run_part, runner_of(network), group))
    setattr(network, TOKEN_GROUP, group)
    for block in chain.from_iterable(spec_of(network).blocks(network).values()):
        for layer in block.modules():
            setattr(layer, TOKEN_PART, grid.context_rank)


def _run_part(
    inner: Runner, group: distributed.ProcessGroup, dit: nn.Module, hidden: Hidden, tweaks: Tweaks
) -> None:
    """Run the blocks on this process' part of the tokens by the runner that was set before."""
    tokens = hidden.tokens
    part = TokenPart(hidden.x.shape[1], group.rank(), group.size(), group)
    hidden.x, hidden.tokens = part.take(hidden.x), tokens.cut(part)
    inner(dit, hidden, tweaks)
    hidden.x, hidden.tokens = part.join(hidden.x), tokens
