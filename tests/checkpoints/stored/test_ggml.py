"""Kinds of GGUF have the values that the package gives them."""

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from checkpoints.stored.ggml import KINDS, get_gguf_kind

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("number", KINDS)
def test_values_of_a_kind_are_those_of_the_package(number: int) -> None:
    kind, theirs = KINDS[number], gguf.GGMLQuantizationType(number)
    assert (kind.name, (kind.weights, kind.size)) == (theirs.name, gguf.GGML_QUANT_SIZES[theirs])
    random = torch.Generator().manual_seed(number)
    rows = torch.randint(0, 256, (6, 3 * kind.size), generator=random, dtype=torch.uint8)
    for start in kind.halves:  # any other bytes are numbers of a model
        blocks = rows.view(-1, kind.size)
        blocks[:, start : start + 2] = torch.randn(18, 1, generator=random).half().view(torch.uint8)

    assert torch.equal(kind.rows(rows), torch.from_numpy(gguf.quants.dequantize(rows.numpy(), theirs)))
    assert kind.is_sound(rows)
    rows[4, kind.size + kind.halves[-1] :][:2] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)  # infinity
    assert not kind.is_sound(rows)


def test_a_rare_kind_is_read_by_the_package() -> None:
    kind = get_gguf_kind(gguf.GGMLQuantizationType.IQ4_NL)
    assert kind is not None
    rows = torch.randint(0, 256, (2, 2 * kind.size), dtype=torch.uint8)
    rows[:, :2] = rows[:, kind.size : kind.size + 2] = torch.ones(2, 1).half().view(torch.uint8)

    expected = gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType.IQ4_NL)
    assert torch.equal(kind.rows(rows), torch.from_numpy(numpy.asarray(expected)))
    with FakeTensorMode() as plan:  # as --plan runs it
        assert kind.rows(plan.from_tensor(rows)).shape == expected.shape
    assert get_gguf_kind(99) is None
