"""Keys and values that the attention of blocks keeps from one call of a network to the next."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor, nn

from protocols.steps import NO_OVERRIDES, Overrides
from runtime.run_blocks import Hidden, run_blocks


class Remembers(Protocol):
    """Attention of a block that reuses keys and values of earlier network calls.

    In a call whose tokens are to be remembered it sets `remembered`; in other calls it appends `remembered`
    to the keys and values of the current tokens. The tensors are not part of the record of tokens, because a
    different key or number in each block would make torch compile every block separately.
    """

    remembered: Sequence[Tensor]  # keys, rotated, and values; empty: nothing is remembered

    def __hash__(self) -> int: ...


Attention = TypeVar("Attention", bound=Remembers)


def remember(
    dit: nn.Module, hidden: Hidden, attentions: Sequence[Attention], overrides: Overrides = NO_OVERRIDES
) -> dict[Attention, Sequence[Tensor]]:
    """Run the blocks on tokens to remember; return the keys and values of each attention.

    Args:
        dit: The transformer.
        hidden: Tokens to remember.
        attentions: Attentions of the blocks.
        overrides: Blocks to skip, whose keys and values are not remembered.
    """
    with remembering({}, attentions):
        run_blocks(dit, hidden, overrides)
        return {attention: attention.remembered for attention in attentions}


@contextlib.contextmanager
def remembering(
    memory: Mapping[Attention, Sequence[Tensor]], attentions: Sequence[Attention]
) -> Iterator[None]:
    """Let the attentions use remembered keys and values during the `with` block, and none afterwards."""
    try:
        for attention, keys_values in memory.items():
            attention.remembered = keys_values
        yield
    finally:
        for attention in attentions:
            attention.remembered = ()
