import math

import pytest
import torch
from diffusers.models.embeddings import Timesteps

from modules.layers.rope import (
    CPU,
    TABLES,
    Grid,
    Slow,
    angles_at,
    exact_table,
    float32_table,
    rotate,
    sinusoid,
    table_maker,
)
from tests.golden_cases import read_case

WHOLE = torch.arange(8, dtype=torch.float64)
WIDTHS = (44, 42, 42)  # frames, rows, columns of a Wan head of 128


def test_table_equals_the_recorded_one() -> None:
    _, tensors = read_case("wan_dit_t2v")  # heads of 64, latents 3 x 6 x 8 cut into patches 1 x 2 x 2

    table = exact_table((3, 3, 4), (24, 20, 20))

    torch.testing.assert_close(table.squeeze(1), tensors["freqs_i_real"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("case", "width", "index", "frames"), [("k6", 12, 5, 21), ("k4", 16, 3, 33)])
def test_a_slowed_frequency_equals_the_recorded_table(case: str, width: int, index: int, frames: int) -> None:
    _, tensors = read_case("guidance")
    expected = tensors[f"rope.riflex_{case}"][0, :, :, :, 0]  # cosine, sine

    table = float32_table((9,), (width,), slow=Slow(index, frames / 0.9)).squeeze(1)

    torch.testing.assert_close(table, expected, atol=1e-6, rtol=0)


def test_a_slowed_frequency_is_one_of_the_first_axis_alone() -> None:
    usual, slow = exact_table((9, 3, 4), WIDTHS), exact_table((9, 3, 4), WIDTHS, slow=Slow(5, 40.0))

    changed = (usual != slow).any(dim=0).squeeze(0).any(dim=-1).nonzero().flatten().tolist()
    assert changed == [5]
    angle = torch.tensor(2 * math.pi / 40, dtype=torch.float64)
    torch.testing.assert_close(
        slow[12, 0, 5], torch.stack([angle.cos(), angle.sin()]).float(), atol=1e-7, rtol=0
    )


@pytest.mark.parametrize("index", [-1, 22])
def test_an_axis_has_no_frequency_beyond_its_pairs(index: int) -> None:
    with pytest.raises(ValueError, match=f"22 frequencies, none of number {index}"):
        angles_at(torch.arange(9.0), 44, slow=Slow(index, 40.0))


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_in_float16_rotates_in_float16(kind: str) -> None:
    x = torch.randn(1, 12, 2, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = table_maker(TABLES[kind], WIDTHS)(Grid((1, 3, 4)), device=CPU)
    half = table_maker(TABLES[kind], WIDTHS, dtype=torch.float16)(Grid((1, 3, 4)), device=CPU)

    turned = rotate(x, half)

    assert (half.dtype, turned.dtype) == (torch.float16, torch.bfloat16)
    torch.testing.assert_close(turned, rotate(x, exact), atol=0.02, rtol=0.01)  # a rounding of bfloat16
    assert torch.equal(half, exact.to(torch.float16))


def test_positions_need_be_neither_counted_nor_whole() -> None:
    positions = torch.tensor([7.0, 0.0, 2.5, -1.0], dtype=torch.float64)

    angles = angles_at(positions, 42)

    assert torch.equal(angles[:2], angles_at(WHOLE, 42)[[7, 0]])
    torch.testing.assert_close(angles[2:], positions[2:, None] * angles_at(WHOLE, 42)[1], rtol=1e-15, atol=0)


NUMBERS = torch.tensor([0.0, 1.0, 37.5, 1000.0, 6000.0])


def test_float32_angles_are_those_of_diffusers() -> None:
    theirs = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)(NUMBERS)

    torch.testing.assert_close(sinusoid(NUMBERS, 256, torch.float32), theirs, rtol=0, atol=1e-6)


def test_float32_frequencies_are_the_same_on_every_processor() -> None:
    exponents = (-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128).tolist()
    angles = torch.outer(NUMBERS, torch.tensor([math.exp(each) for each in exponents]))

    assert torch.equal(sinusoid(NUMBERS, 256, torch.float32), torch.cat([angles.cos(), angles.sin()], dim=1))
