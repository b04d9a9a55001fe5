"""Tokens side by side have the bits that `torch.cat` behind separate operators gives, and so do gradients."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.traffic_count import Counting
from hunyuan_model.joining import gelu, join_gelu, turn_and_join, turn_first
from modules.layers.rope import exact_table, rotate

B, L, T, N, D = 2, 24, 5, 8, 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def table() -> Tensor:
    return exact_table((2, 3, 4), (4, 6, 6))


def first_plainly(x: Tensor, turns: Tensor) -> Tensor:
    return torch.cat([rotate(x[:, :L], turns), x[:, L:]], dim=1)


def joined_plainly(video: Tensor, text: Tensor, turns: Tensor) -> Tensor:
    return torch.cat([rotate(video, turns), text], dim=1)


def gelu_plainly(seen: Tensor, hidden: Tensor) -> Tensor:
    return torch.cat([seen, gelu(hidden)], dim=-1)


def inputs_of(what: str, dtype: torch.dtype) -> list[Tensor]:
    if what == "gelu":  # whole vectors of the CPU, which computes the rest of a row in another way
        return [draw(B, L + T, 48, dtype=dtype), draw(B, L + T, 64, dtype=dtype)]
    if what == "first":
        return [draw(B, L + T, N, D, dtype=dtype)]
    return [draw(B, L, N, D, dtype=dtype), draw(B, T, N, D, dtype=dtype)]


def call(function: Callable[..., Tensor], what: str, inputs: Sequence[Tensor]) -> Tensor:
    return function(*inputs) if what == "gelu" else function(*inputs, table())


PAIRS = {
    "first": (turn_first, first_plainly),
    "join": (turn_and_join, joined_plainly),
    "gelu": (join_gelu, gelu_plainly),
}


@pytest.mark.parametrize("transposed", [False, True], ids=["", "gradient of another layout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", PAIRS)
def test_bits_are_those_of_separate_operators(what: str, dtype: torch.dtype, transposed: bool) -> None:
    inputs = inputs_of(what, dtype)
    results = []
    for function in PAIRS[what]:
        out = call(function, what, inputs)
        given = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        given = given.transpose(1, -1).contiguous().transpose(1, -1) if transposed else given
        results.append([out, *torch.autograd.grad(out, inputs, given)])

    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("what", PAIRS)
def test_there_are_fewer_passes(what: str) -> None:
    totals = []
    for function in PAIRS[what]:
        inputs = inputs_of(what, torch.bfloat16)
        with Counting(torch.device("cpu")) as counting:
            out = call(function, what, inputs)
            torch.autograd.grad(out, inputs, torch.empty_like(out))
        totals.append(sum(each.size for each in counting.operations))

    assert totals[0] < 0.93 * totals[1]
