"""Where FramePack's tokens stand."""

import pytest
import torch
import torch.nn.functional as functional

from frame_pack.positions import Stretch, WindowLayout, position_scale, rotary_table
from modules.layers.rope import exact_table

WIDTHS, THETA = (8, 28, 28), 256.0


def table(
    indices: tuple[int, ...], coarseness: int, rows: int = 5, columns: int = 6, scale: float = 1.0
) -> torch.Tensor:
    return rotary_table(WindowLayout((Stretch((indices,), coarseness),), rows, columns, scale), WIDTHS, THETA)


def test_counted_indices_give_the_table_of_a_grid() -> None:
    assert torch.equal(table((0, 1, 2), 1), exact_table((3, 5, 6), WIDTHS, THETA))


def test_given_indices_pick_their_frames_from_that_table() -> None:
    whole = exact_table((9, 5, 6), WIDTHS, THETA).unflatten(0, (9, -1))

    assert torch.equal(table((7, 0, 3), 1), whole[[7, 0, 3]].flatten(0, 1))


@pytest.mark.parametrize("coarseness", [2, 4])
def test_coarse_tokens_have_the_mean_of_the_turns_they_cover_the_border_repeated(coarseness: int) -> None:
    frames, rows, columns = 6, 5, 7
    fine = (
        table(tuple(range(3, 3 + frames)), 1, rows, columns)
        .reshape(1, frames, rows, columns, -1)
        .permute(0, 4, 1, 2, 3)
    )
    missing = [end for size in (columns, rows, frames) for end in (0, -size % coarseness)]

    pooled = functional.avg_pool3d(functional.pad(fine, missing, mode="replicate"), coarseness)

    expected = pooled.permute(0, 2, 3, 4, 1).reshape(-1, 1, 32, 2)
    # means of float32 numbers, ours of float64
    torch.testing.assert_close(
        table(tuple(range(3, 3 + frames)), coarseness, rows, columns), expected, rtol=0, atol=1e-6
    )


def test_the_scale_acts_on_rows_and_columns_alone() -> None:
    whole = exact_table((3, 9, 11), WIDTHS, THETA).unflatten(0, (3, 9, 11))

    doubled = table((0, 1, 2), 1, scale=2.0)

    assert torch.equal(doubled, whole[:, ::2, ::2].flatten(0, 2))


@pytest.mark.parametrize(("timestep", "expected"), [(799.0, 1.0), (800.0, 0.7), (1000.0, 0.7)])
def test_positions_are_scaled_from_the_threshold_on(timestep: float, expected: float) -> None:
    timesteps = torch.full((2,), timestep)
    assert position_scale(timesteps, 800, 0.7) == expected
    assert position_scale(timesteps, None, 0.7) == 1.0


def test_samples_have_tables_of_their_own_only_where_their_indices_differ() -> None:
    alike = WindowLayout((Stretch(((4, 5), (4, 5)), 1), Stretch(((9,), (9,)), 2)), 2, 2, 1.0)
    apart = WindowLayout((Stretch(((4, 5), (4, 6)), 1), Stretch(((9,), (9,)), 2)), 2, 2, 1.0)

    one, two = rotary_table(alike, WIDTHS, THETA), rotary_table(apart, WIDTHS, THETA)

    assert one.shape == (2 * 4 + 1, 1, 32, 2)
    assert two.shape == (2, 2 * 4 + 1, 1, 32, 2)
    assert torch.equal(two[0], one)
    assert not torch.equal(two[0, 4:8], two[1, 4:8])
    assert torch.equal(two[0, 8:], two[1, 8:])
