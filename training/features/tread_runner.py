"""Let some tokens bypass the middle blocks of a transformer without a change.

    with routed(dit, route):
        velocity = dit(noisy, timesteps, text)

The tokens are selected when their grid is known, after the network has embedded its inputs. The runner of the
network's blocks is wrapped, so this works with swapped, checkpointed and compiled blocks, which get fewer
tokens. Source: Krause et al. 2025, arXiv 2501.04765 (TREAD).
"""
# Letters: B batch, L tokens, K tokens that go through the middle blocks, C width

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from protocols.steps import Overrides
from runtime.run_blocks import Hidden, Runner, runner_of, set_runner, spec_of

# returns the indices of the tokens that go through the blocks, B K ascending, for the sizes of the token grid
SelectKeptTokens = Callable[[tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Route:
    """A range of blocks, and the function that selects the tokens processed by these blocks."""

    first: int  # index of the first block; negative: from the end
    last: int  # index of the last block, inclusive; negative: from the end
    choose: SelectKeptTokens

    def blocks_of(self, count: int) -> range:
        """Return the indices of the routed blocks in a network of `count` blocks."""
        return range(block_number(self.first, count), block_number(self.last, count) + 1)


def block_number(number: int, count: int) -> int:
    """Return the index of a block counted from the front.

    Args:
        number: Index of the block; negative ones count from the end.
        count: Number of blocks.
    """
    return number + count if number < 0 else number


@contextmanager
def routed(dit: nn.Module, route: Route) -> Iterator[None]:
    """Route only the selected tokens through the middle blocks during the `with` block."""
    before = runner_of(dit)
    set_runner(dit, functools.partial(_run_routed, before, route))
    try:
        yield
    finally:
        set_runner(dit, before)


def _run_routed(inner: Runner, route: Route, dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
    count = sum(len(blocks) for blocks in spec_of(dit).blocks(dit).values())
    hidden.before_block = _Parting(route, route.blocks_of(count)).at
    inner(dit, hidden, overrides)
    hidden.before_block = None


class _Parting:
    """Tokens of one forward pass that skip the middle blocks, and are put back afterwards."""

    def __init__(self, route: Route, blocks: range) -> None:
        self._route = route
        self._blocks = blocks
        self._kept = torch.empty(0)
        self._waiting: tuple[Tensor, Any] | None = None  # all tokens before the route, and their record

    def at(self, number: int, hidden: Hidden) -> None:
        """Take tokens out before the first block of the route, and put them back after the last one."""
        if number == self._blocks.start:
            self._part(hidden)
        elif number == self._blocks.stop and self._waiting is not None:
            x, hidden.tokens = self._waiting
            self._waiting = None
            hidden.x = x.scatter(1, _wide(self._kept, x), hidden.x.to(x.dtype))

    def _part(self, hidden: Hidden) -> None:
        """Keep only some of the clip's tokens for the routed blocks, and all tokens for after them.

        `hidden` is changed in place. Nothing happens if the route leaves no token out.
        """
        x, tokens = hidden.x, hidden.tokens
        grid: tuple[int, ...] = tokens.grid
        selected = self._route.choose(grid)
        start = tokens.first_image
        num_tokens = torch.Size(grid).numel()
        num_left_out = num_tokens - selected.shape[1]
        if not num_left_out:
            return
        # keep all tokens before and after those of the clip, such as text tokens
        all_indices = torch.arange(x.shape[1], device=selected.device).expand(len(x), -1)
        # B N; the indices of the selected tokens count from the clip's first token
        index_ranges = [all_indices[:, :start], selected + start, all_indices[:, start + num_tokens :]]
        self._kept = torch.cat(index_ranges, dim=1).to(x.device)
        self._waiting = x, tokens  # all tokens, into which the kept ones return after the routed blocks
        hidden.tokens = tokens.select(self._kept, num_left_out)
        hidden.x = x.gather(1, _wide(self._kept, x))


def _wide(places: Tensor, x: Tensor) -> Tensor:
    return places.unsqueeze(2).expand(-1, -1, x.shape[2])
