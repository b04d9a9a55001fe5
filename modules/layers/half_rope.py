"""Rotation by position of models that pair the channels of a head's two halves (GPT-NeoX).

`modules.layers.rope.rotate` pairs neighbors, and makes the tables of both.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Letters: B batch, L tokens, N heads, D head width


def rotate_halves(x: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs of channels of x, B L N D: one from the first half of a head, one from the second.

    `table` contains cosines and sines, L N D/2 2 or L 1 D/2 2. Computes in its dtype and returns the dtype of
    x. Compiled code gets plain operators, which the compiler fuses.
    """
    cosine, sine = table.unbind(-1)
    if torch.compiler.is_compiling():
        first, second = x.type_as(table).chunk(2, dim=-1)
        # the products of eager code, so that both give the same bits where nothing is fused
        rotated_first = torch.addcmul(first * cosine, second, sine, value=-1)
        rotated_second = torch.addcmul(second * cosine, first, sine)
        return torch.cat([rotated_first, rotated_second], dim=-1).type_as(x)
    rotated: Tensor = _Rotate.apply(x, cosine, sine)
    return rotated


class _Rotate(torch.autograd.Function):
    """Rotates in three kernels that cast while reading and writing; the backward pass rotates back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotate_by(x, cosine, sine, direction=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotate_by(gradient, cosine, sine, direction=-1), None, None


def _rotate_by(x: Tensor, cosine: Tensor, sine: Tensor, direction: int) -> Tensor:
    """Rotate the channels of x, B L N D, by angles given as cosine and sine; -1 rotates back."""
    halves = x.unflatten(-1, (2, -1))  # B L N 2 D/2
    first, second = halves.unbind(-2)
    first_products, second_products = (halves * cosine.unsqueeze(-2)).unbind(-2)
    rotated = torch.empty_like(halves)
    # with `out` also because autocast would cast the inputs of a plain addcmul
    torch.addcmul(first_products, second, sine, value=-direction, out=rotated[..., 0, :])
    torch.addcmul(second_products, first, sine, value=direction, out=rotated[..., 1, :])
    return rotated.flatten(-2)
