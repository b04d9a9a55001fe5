"""Shift, scale and gate give the bits that separate operators give, forward and backward."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modules.layers.modulation import add_gated, modulate

B, L, C = 2, 24, 64
BOTH = (torch.float32, torch.bfloat16)


def draw(*shape: int, dtype: torch.dtype = torch.float32, learns: bool = True) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(learns)


def gradients(result: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a sum with drawn weights, the same at each call."""
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    return list(torch.autograd.grad(result, [each for each in inputs if each.requires_grad], weights))


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("of_modulation", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("samples", [1, B])
def test_modulating_gives_the_bits_of_separate_operators(
    learns: bool, of_modulation: torch.dtype, dtype: torch.dtype, samples: int
) -> None:
    normed = draw(B, L, C)
    shift, scale = (draw(samples, 1, C, dtype=of_modulation, learns=learns) for _ in range(2))
    inputs = normed, shift, scale

    found = modulate(*inputs, dtype)

    expected = torch.addcmul(shift, normed.to(of_modulation), 1 + scale).to(dtype)
    assert_same([found, *gradients(found, inputs)], [expected, *gradients(expected, inputs)])


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("samples", [1, B])
def test_a_gated_sum_has_the_bits_of_separate_operators(
    learns: bool, dtype: torch.dtype, samples: int
) -> None:
    inputs = draw(B, L, C), draw(samples, 1, C, learns=learns), draw(B, L, C, dtype=dtype)
    x, gate, branch = inputs

    with torch.autocast("cpu", torch.bfloat16):
        found = add_gated(*inputs)

    expected = torch.addcmul(x, gate, branch.float())
    assert_same([found, *gradients(found, inputs)], [expected, *gradients(expected, inputs)])


@pytest.mark.parametrize("split", [5, -5])
@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_segments_have_the_bits_of_each_by_itself(split: int, compiles: bool) -> None:
    """In one result, whose gradients belong to the rows of both."""
    x, branch = draw(B, L, C), draw(B, L, C, dtype=torch.bfloat16)
    shift, scale, gate = (draw(B, 2, C) for _ in range(3))
    inputs = x, branch, shift, scale, gate

    def whole() -> Tensor:
        return add_gated(modulate(x, shift, scale, torch.float32, split), gate, branch, split)

    found = torch.compile(whole, backend="eager", fullgraph=True)() if compiles else whole()

    parts = []
    for row, here in enumerate((slice(None, split), slice(split, None))):
        plus, times, opened = (one[:, row : row + 1] for one in (shift, scale, gate))
        parts.append(add_gated(modulate(x[:, here], plus, times, torch.float32), opened, branch[:, here]))
    expected = torch.cat(parts, dim=1)
    assert_same([found, *gradients(found, inputs)], [expected, *gradients(expected, inputs)])


def test_recomputation_ends_before_the_last_branch_is_added() -> None:
    calls = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            calls.append("computed")
            return x * x

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient

    def block(x: Tensor, gate: Tensor) -> Tensor:
        return add_gated(x, gate, Square.apply(x.sin()))

    x = draw(B, L, C)
    checkpoint(block, x, draw(1, 1, C, learns=False), use_reentrant=False).sum().backward()
    assert len(calls) == 1

    checkpoint(block, x, draw(1, 1, C), use_reentrant=False).sum().backward()  # a gate that learns needs it
    assert len(calls) == 3
