"""Tokens side by side have the bits that `torch.cat` behind separate operators gives, and so do gradients."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hunyuan_model.joining import gelu, join_gelu, turn_and_join, turn_first
from modules.layers.rope import exact_table, rotate

B, L, T, N, D = 2, 24, 5, 3, 16
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
    if what == "gelu":
        return [draw(B, L + T, 48, dtype=dtype), draw(B, L + T, 70, dtype=dtype)]
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


class Passes(TorchDispatchMode):
    """Count numbers that operators other than views read and write."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            tensors = [each for each in (*args, *(kwargs or {}).values(), result) if isinstance(each, Tensor)]
            self.total += sum(each.numel() * each.element_size() for each in tensors)
        return result


@pytest.mark.parametrize("what", PAIRS)
def test_there_are_fewer_passes(what: str) -> None:
    totals = []
    for function in PAIRS[what]:
        inputs = inputs_of(what, torch.bfloat16)
        with Passes() as passes:
            out = call(function, what, inputs)
            torch.autograd.grad(out, inputs, torch.empty_like(out))
        totals.append(passes.total)

    assert totals[0] < 0.9 * totals[1]
