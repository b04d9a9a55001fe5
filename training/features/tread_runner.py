"""Let some tokens bypass the middle blocks of a transformer unchanged.

    with bypassing_blocks(dit, route):
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

from modules.layers.modulation import expand_indices
from protocols.steps import Overrides
from runtime.run_blocks import Hidden, Runner, get_runner, get_spec, set_runner

# returns the indices of the tokens that go through the blocks, B K ascending, for the sizes of the token grid
SelectKeptTokens = Callable[[tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Route:
    """A range of blocks, and the function that selects the tokens processed by these blocks."""

    first: int  # index of the first block; negative: from the end
    last: int  # index of the last block, inclusive; negative: from the end
    select_tokens: SelectKeptTokens

    def get_block_range(self, count: int) -> range:
        """Return the indices of the routed blocks in a network of `count` blocks."""
        return range(block_number(self.first, count), block_number(self.last, count) + 1)


def block_number(number: int, count: int) -> int:
    """Convert a possibly negative block index to one that counts from the front.

    Args:
        number: Index of the block; negative ones count from the end.
        count: Number of blocks.
    """
    return number + count if number < 0 else number


@contextmanager
def bypassing_blocks(dit: nn.Module, route: Route) -> Iterator[None]:
    """Route only the selected tokens through the middle blocks during the `with` block."""
    before = get_runner(dit)
    set_runner(dit, functools.partial(_run_routed, before, route))
    try:
        yield
    finally:
        set_runner(dit, before)


def _run_routed(inner: Runner, route: Route, dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
    count = sum(len(blocks) for blocks in get_spec(dit).blocks(dit).values())
    hidden.before_block = _TokenBypass(route, route.get_block_range(count)).before_block
    inner(dit, hidden, overrides)
    hidden.before_block = None


class _TokenBypass:
    """Tokens of one forward pass that skip the middle blocks and are restored afterwards."""

    def __init__(self, route: Route, blocks: range) -> None:
        self._route = route
        self._blocks = blocks
        self._kept_indices = torch.empty(0)
        self._all_tokens: tuple[Tensor, Any] | None = None  # all tokens before the route, and their record

    def before_block(self, number: int, hidden: Hidden) -> None:
        """Remove tokens before the first routed block, and restore them before the block after the last."""
        if number == self._blocks.start:
            self._take_out_tokens(hidden)
        elif number == self._blocks.stop and self._all_tokens is not None:
            x, hidden.tokens = self._all_tokens
            self._all_tokens = None
            hidden.x = x.scatter(1, expand_indices(self._kept_indices, x), hidden.x.to(x.dtype))

    def _take_out_tokens(self, hidden: Hidden) -> None:
        """Remove the tokens that bypass the routed blocks from `hidden`; remember all tokens for later."""
        # Only tokens of the clip can be removed; others, such as text tokens, are kept.
        x, tokens = hidden.x, hidden.tokens
        grid: tuple[int, ...] = tokens.grid
        selected = self._route.select_tokens(grid)  # indices relative to the clip's first token
        num_clip_tokens = torch.Size(grid).numel()
        num_dropped = num_clip_tokens - selected.shape[1]
        if not num_dropped:
            return
        clip_start = tokens.first_noisy_token
        clip_end = clip_start + num_clip_tokens
        all_indices = torch.arange(x.shape[1], device=selected.device).expand(len(x), -1)
        kept_indices = [all_indices[:, :clip_start], selected + clip_start, all_indices[:, clip_end:]]
        self._kept_indices = torch.cat(kept_indices, dim=1).to(x.device)
        self._all_tokens = x, tokens
        hidden.tokens = tokens.select(self._kept_indices, num_dropped)
        hidden.x = x.gather(1, expand_indices(self._kept_indices, x))
