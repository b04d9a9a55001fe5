"""Rotation by position of models that pair the channels of a head's two halves (GPT-NeoX).

`modules.layers.rope.rotate` pairs neighbors, and makes the tables of both.
"""

import torch
from torch import Tensor

# Letters: B batch, L tokens, N heads, D head width


def rotate_halves(x: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs of channels of x, B L N D: one from the first half of a head, one from the second.

    `table` is L N D/2 2 or L 1 D/2 2, of cosines and sines. Computed in its dtype, returned in the dtype of
    x.
    """
    first, second = x.type_as(table).chunk(2, dim=-1)
    cosine, sine = table.unbind(-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).type_as(x)
