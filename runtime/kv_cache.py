"""Keys and values that the blocks' attention keeps from one network call to the next."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor, nn

from protocols.steps import NO_OVERRIDES, Overrides
from runtime.run_blocks import Hidden, run_blocks


class CachesKeysValues(Protocol):
    """Attention of a block that reuses keys and values of earlier network calls.

    In a call whose tokens are to be cached it sets `cached_keys_values`; in other calls it appends them to
    the keys and values of the current tokens. The tensors are not part of the record of tokens, because a
    different key or number in each block would make torch compile every block separately.
    """

    cached_keys_values: Sequence[Tensor]  # keys, rotated, and values; empty: nothing is cached

    def __hash__(self) -> int: ...


Attention = TypeVar("Attention", bound=CachesKeysValues)


def compute_keys_values(
    dit: nn.Module, hidden: Hidden, attentions: Sequence[Attention], overrides: Overrides = NO_OVERRIDES
) -> dict[Attention, Sequence[Tensor]]:
    """Run the blocks on tokens to cache; return the keys and values of each attention.

    Args:
        dit: The transformer.
        hidden: Tokens to cache.
        attentions: Attentions of the blocks.
        overrides: Blocks to skip, whose keys and values are not cached.
    """
    with use_keys_values({}, attentions):
        run_blocks(dit, hidden, overrides)
        return {attention: attention.cached_keys_values for attention in attentions}


@contextlib.contextmanager
def use_keys_values(
    memory: Mapping[Attention, Sequence[Tensor]], attentions: Sequence[Attention]
) -> Iterator[None]:
    """Let the attentions use cached keys and values during the `with` block, and none afterwards."""
    try:
        for attention, keys_values in memory.items():
            attention.cached_keys_values = keys_values
        yield
    finally:
        for attention in attentions:
            attention.cached_keys_values = ()
