import math

import pytest
import torch

from modules.layers import rope
from modules.layers.rope import (
    CPU,
    TABLES,
    Grid,
    GridTable,
    Slow,
    angles_at,
    axis_angles,
    exact_table,
    float32_table,
    on_grid,
    rotate,
    table_maker,
)
from tests.golden_cases import read_case

WIDTHS = (44, 42, 42)  # frames, rows, columns of a Wan head of 128


def test_table_equals_the_recorded_one() -> None:
    _, tensors = read_case("wan_dit_t2v")  # heads of 64, latents 3 x 6 x 8 cut into patches 1 x 2 x 2

    table = exact_table((3, 3, 4), (24, 20, 20))

    torch.testing.assert_close(table.squeeze(1), tensors["freqs_i_real"], atol=1e-6, rtol=0)


def test_angles_are_position_times_falling_frequency() -> None:
    angles = axis_angles(1001, 42)

    assert angles.dtype == torch.float64
    assert angles[1, 0] == 1
    assert angles[1000, 3] == pytest.approx(1000 * 10000 ** (-6 / 42), rel=1e-12)


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
        axis_angles(9, 44, slow=Slow(index, 40.0))


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

    assert torch.equal(angles[:2], axis_angles(8, 42)[[7, 0]])
    torch.testing.assert_close(angles[2:], positions[2:, None] * axis_angles(2, 42)[1], rtol=1e-15, atol=0)


def test_tokens_run_through_columns_first_then_rows_then_frames() -> None:
    places = on_grid([torch.arange(size).unsqueeze(1) for size in (2, 3, 4)])

    assert places.shape == (24, 3)
    assert places[1 * 12 + 2 * 4 + 3].tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", TABLES)
def test_a_pair_is_turned_by_its_angle(kind: str) -> None:
    table = TABLES[kind]((2,), (2,))
    x = torch.tensor([[3.0, 0.0], [3.0, 0.0]]).view(1, 2, 1, 2)

    turned = rotate(x, table)

    angle = torch.tensor(1.0)
    torch.testing.assert_close(
        turned[0, :, 0], torch.stack([torch.tensor([3.0, 0.0]), 3 * torch.stack([angle.cos(), angle.sin()])])
    )


def test_compiled_rotation_is_the_same_but_for_rounding() -> None:
    x = torch.randn(2, 5 * 6 * 7, 2, 128, generator=torch.Generator().manual_seed(0))
    table = exact_table((5, 6, 7), WIDTHS)

    compiled = torch.compile(rotate, backend="eager", fullgraph=True)(x, table)

    # a few units in the last place of 4
    torch.testing.assert_close(compiled, rotate(x, table), atol=2e-6, rtol=0)


def test_float32_angles_are_near_the_exact_ones() -> None:
    tables = [make((5, 60, 70), WIDTHS) for make in TABLES.values()]

    torch.testing.assert_close(*tables, atol=1e-5, rtol=0)  # angles of up to 70


@pytest.mark.parametrize("kind", TABLES)
def test_dot_products_depend_on_the_distance_only(kind: str) -> None:
    query, key = torch.randn(2, 1, 1, 1, 42, generator=torch.Generator().manual_seed(0)).unbind()
    table = TABLES[kind]((300,), (42,))

    def product(first: int, second: int) -> torch.Tensor:
        return (rotate(query, table[first : first + 1]) * rotate(key, table[second : second + 1])).sum()

    torch.testing.assert_close(product(3, 10), product(280, 287), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", TABLES)
def test_bfloat16_comes_back_as_bfloat16_rounded_once(kind: str) -> None:
    x = torch.randn(1, 300, 1, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    table = TABLES[kind]((300, 1, 1), WIDTHS)

    turned = rotate(x, table)

    assert torch.equal(turned, rotate(x.float(), table).to(torch.bfloat16))


@pytest.mark.parametrize("kind", TABLES)
def test_the_host_computes_and_sends_axes_but_no_table(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def record(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append(tensor.numel())
        return tensor.to(device)

    monkeypatch.setattr(rope, "send_ahead", record)

    table = TABLES[kind]((21, 30, 52), WIDTHS, device=torch.device("meta"))

    assert table.is_meta
    assert sent == [21 * 44, 30 * 42, 52 * 42]  # a cosine and a sine for every two channels


def test_a_table_is_made_anew_only_for_another_grid_or_device() -> None:
    asked = []

    def make(grid: tuple[int, int, int], /, *, device: torch.device) -> torch.Tensor:
        asked.append(grid)
        return torch.tensor(grid, device=device)

    table, cpu = GridTable(make), torch.device("cpu")
    with torch.inference_mode():
        first = table.of((1, 2, 3), cpu)

    assert not first.is_inference()
    assert table.of((1, 2, 3), cpu) is first
    assert table.of((1, 2, 4), cpu).tolist() == [1, 2, 4]
    assert table.of((1, 2, 4), torch.device("meta")).is_meta
    assert asked == [(1, 2, 3), (1, 2, 4), (1, 2, 4)]
