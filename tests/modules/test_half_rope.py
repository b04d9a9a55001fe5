"""Rotation of pairs across the halves of a head, in few kernels."""

import pytest
import torch
from torch import Tensor

from modules.layers.half_rope import rotate_halves
from tests.networks.test_cast_factors import Kernels


def rotate_plainly(x: Tensor, table: Tensor) -> Tensor:
    """The formula, of which compiled code is made."""
    first, second = x.type_as(table).chunk(2, dim=-1)
    cosine, sine = table.unbind(-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).type_as(x)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_results_and_gradients_are_those_of_the_formula(dtype: torch.dtype, near: float, heads: int) -> None:
    torch.manual_seed(0)
    angles = torch.randn(5, heads, 4)
    table = torch.stack([angles.cos(), angles.sin()], -1)
    gradient = torch.randn(2, 5, 3, 8).to(dtype)
    results = []
    for rotate in (rotate_plainly, rotate_halves):
        x = torch.linspace(-2, 2, 2 * 5 * 3 * 8).view(2, 5, 3, 8).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            rotated = rotate(x, table)
        rotated.backward(gradient)
        assert x.grad is not None
        results.append((rotated, x.grad))

    for plain, found in zip(*results, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, plain, rtol=near, atol=near)


def test_three_kernels_rotate_in_16_bits_and_three_more_its_gradient() -> None:
    angles = torch.randn(5, 1, 4)
    table = torch.stack([angles.cos(), angles.sin()], -1)
    x = torch.randn(2, 5, 3, 8).bfloat16().requires_grad_()
    with Kernels() as kernels:
        rotated = rotate_halves(x, table)
        rotated.backward(torch.ones_like(rotated))

    assert kernels.counts["aten::mul.Tensor"] == 2
    assert kernels.counts["aten::addcmul.out"] == 4
    assert kernels.counts["aten::_to_copy"] == 0
