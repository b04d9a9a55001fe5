"""Layers: modulation with the bits of separate operators, positions, convolutions of any size."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint

from modules.layers.convolution import conv3d, repeat_pixels
from modules.layers.modulation import add_gated, modulate
from modules.layers.rope import (
    CPU,
    TABLES,
    SlowedFrequency,
    TokenGrid,
    bind_rotary_table,
    float32_table,
    rotary_table,
    rotate,
    rotation_angles,
    sinusoid,
)
from tests.golden_cases import read_case

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
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("samples", [1, B])
def test_modulating_and_gated_sums_give_the_bits_of_separate_operators(
    learns: bool, dtype: torch.dtype, samples: int
) -> None:
    normed, branch = draw(B, L, C), draw(B, L, C, dtype=dtype)
    for of_modulation in (torch.float32, torch.float16):
        shift, scale = (draw(samples, 1, C, dtype=of_modulation, learns=learns) for _ in range(2))
        found = modulate(normed, shift, scale, dtype)
        expected = torch.addcmul(shift, normed.to(of_modulation), 1 + scale).to(dtype)
        inputs = normed, shift, scale
        assert_same([found, *gradients(found, inputs)], [expected, *gradients(expected, inputs)])

    gate = draw(samples, 1, C, learns=learns)
    with torch.autocast("cpu", torch.bfloat16):
        found = add_gated(normed, gate, branch)
    expected = torch.addcmul(normed, gate, branch.float())
    inputs = normed, gate, branch
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

    for learns, times in ((False, 1), (True, 2)):  # a gate that learns needs it
        calls.clear()
        checkpoint(block, draw(B, L, C), draw(1, 1, C, learns=learns), use_reentrant=False).sum().backward()
        assert len(calls) == times


FULL = torch.arange(8, dtype=torch.float64)
WIDTHS = (44, 42, 42)  # frames, rows, columns of a Wan head of 128


def test_table_equals_the_recorded_one() -> None:
    _, tensors = read_case("wan_dit_t2v")  # heads of 64, latents 3 x 6 x 8 cut into patches 1 x 2 x 2

    table = rotary_table(TokenGrid((3, 3, 4)), (24, 20, 20))

    torch.testing.assert_close(table.squeeze(1), tensors["freqs_i_real"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("case", "width", "index", "frames"), [("k6", 12, 5, 21), ("k4", 16, 3, 33)])
def test_a_slowed_frequency_equals_the_recorded_table(case: str, width: int, index: int, frames: int) -> None:
    _, tensors = read_case("guidance")
    expected = tensors[f"rope.riflex_{case}"][0, :, :, :, 0]  # cosine, sine

    table = float32_table(TokenGrid((9,), SlowedFrequency(index, frames / 0.9)), (width,)).squeeze(1)

    torch.testing.assert_close(table, expected, atol=1e-6, rtol=0)


def test_a_slowed_frequency_is_one_of_the_first_axis_alone() -> None:
    default, slow = (
        rotary_table(TokenGrid((9, 3, 4), one), WIDTHS) for one in (None, SlowedFrequency(5, 40.0))
    )

    changed = (default != slow).any(dim=0).squeeze(0).any(dim=-1).nonzero().flatten().tolist()
    expected = torch.tensor([math.cos(2 * math.pi / 40), math.sin(2 * math.pi / 40)])
    assert changed == [5]
    torch.testing.assert_close(slow[12, 0, 5], expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("index", [-1, 22])
def test_an_axis_has_no_frequency_beyond_its_pairs(index: int) -> None:
    with pytest.raises(ValueError, match=f"22 frequencies, none of number {index}"):
        rotation_angles(torch.arange(9.0), 44, slow=SlowedFrequency(index, 40.0))


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_in_float16_rotates_in_float16(kind: str) -> None:
    x = torch.randn(1, 12, 2, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = bind_rotary_table(TABLES[kind], WIDTHS)(TokenGrid((1, 3, 4)), device=CPU)
    half = bind_rotary_table(TABLES[kind], WIDTHS, dtype=torch.float16)(TokenGrid((1, 3, 4)), device=CPU)

    turned = rotate(x, half)

    assert (half.dtype, turned.dtype) == (torch.float16, torch.bfloat16)
    torch.testing.assert_close(turned, rotate(x, exact), atol=0.02, rtol=0.01)  # a rounding of bfloat16
    assert torch.equal(half, exact.to(torch.float16))


def test_positions_need_be_neither_counted_nor_whole() -> None:
    positions = torch.tensor([7.0, 0.0, 2.5, -1.0], dtype=torch.float64)

    angles = rotation_angles(positions, 42)

    assert torch.equal(angles[:2], rotation_angles(FULL, 42)[[7, 0]])
    torch.testing.assert_close(
        angles[2:], positions[2:, None] * rotation_angles(FULL, 42)[1], rtol=1e-15, atol=0
    )


NUMBERS = torch.tensor([0.0, 1.0, 37.5, 1000.0, 6000.0])


def test_float32_angles_are_those_of_diffusers() -> None:
    theirs = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)(NUMBERS)

    torch.testing.assert_close(sinusoid(NUMBERS, 256, torch.float32), theirs, rtol=0, atol=1e-6)


def test_float32_frequencies_are_the_same_on_every_processor() -> None:
    exponents = (-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128).tolist()
    angles = torch.outer(NUMBERS, torch.tensor([math.exp(each) for each in exponents]))

    assert torch.equal(sinusoid(NUMBERS, 256, torch.float32), torch.cat([angles.cos(), angles.sin()], dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{"padding": (0, 1, 1)}, {"stride": (2, 1, 1), "bias": False}, {"groups": 2, "dilation": 2}],
    ids=["padded", "with a stride", "in groups"],
)
def test_small_clips_give_what_the_layer_gives(dtype: torch.dtype, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv3d(4, 6, 3, **options).to(dtype)
    x = torch.randn(1, 4, 7, 9, 8, dtype=dtype)

    torch.testing.assert_close(conv3d(layer, x), layer(x))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("factor", [2, 3])
def test_pixels_are_repeated_however_many_there_are(layout: torch.memory_format, factor: int) -> None:
    x = torch.randn(2, 5, 6, 7).to(memory_format=layout)
    expected = interpolate(x, scale_factor=factor, mode="nearest")

    for maximum in (expected.numel(), expected.numel() - 1):
        made = repeat_pixels(x, factor, maximum)
        assert torch.equal(made, expected)
        assert made.is_contiguous(memory_format=layout)
