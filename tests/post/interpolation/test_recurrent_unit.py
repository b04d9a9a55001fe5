"""The recurrent unit of both optical flows: what is computed once adds up to the unit's definition."""

import torch
from torch import Tensor

from post.interpolation.raft import SeparableGru


def plain(gru: SeparableGru, hidden: Tensor, inputs: Tensor) -> Tensor:
    """As defined: Teed and Deng 2020, arXiv 2003.12039, section 3.3, along rows, then along columns."""
    for number in (1, 2):
        update, reset, fresh = (getattr(gru, f"conv{gate}{number}") for gate in "zrq")
        both = torch.cat([hidden, inputs], dim=1)
        z, r = update(both).sigmoid(), reset(both).sigmoid()
        q = fresh(torch.cat([r * hidden, inputs], dim=1)).tanh()
        hidden = (1 - z) * hidden + z * q
    return hidden


@torch.no_grad()
def test_a_unit_that_reads_its_context_once_is_the_defined_one() -> None:
    gru = SeparableGru(hidden=4, inputs=3 + 5)
    hidden, context, motion = (torch.randn(1, channels, 6, 7) for channels in (4, 3, 5))

    found = gru(hidden, motion, gru.turns(context))

    torch.testing.assert_close(found, plain(gru, hidden, torch.cat([context, motion], dim=1)))
