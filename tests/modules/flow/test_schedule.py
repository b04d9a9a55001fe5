"""Blending, the time shift and the schedules."""

import pytest
import torch

from modules.flow.schedule import add_noise, make_schedule, shift_sigmas


@pytest.mark.parametrize(("sigma", "expected"), [(0.0, 2.0), (0.25, 1.0), (1.0, -2.0)])
def test_noise_blend_is_linear_in_sigma(sigma: float, expected: float) -> None:
    latents = torch.full((2, 16, 3, 4, 4), 2.0)
    noise = torch.full_like(latents, -2.0)

    noisy = add_noise(latents, noise, torch.full((2,), sigma))

    torch.testing.assert_close(noisy, torch.full_like(latents, expected))


def test_each_sample_has_its_own_sigma_and_the_dtype_stays() -> None:
    latents = torch.zeros(2, 1, 1, 1, 1, dtype=torch.bfloat16)
    noisy = add_noise(latents, torch.ones_like(latents), torch.tensor([0.25, 0.5]))
    assert noisy.dtype == torch.bfloat16
    assert noisy.flatten().tolist() == [0.25, 0.5]


def test_the_shift_keeps_both_ends_and_1_changes_nothing() -> None:
    sigmas = torch.linspace(0, 1, 5)
    torch.testing.assert_close(shift_sigmas(sigmas, 1.0), sigmas)
    shifted = shift_sigmas(sigmas, 5.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert float(shifted[2]) == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("solver", "timesteps"),
    [("unipc", [999, 922, 817, 666, 428]), ("dpm++", [1000, 923, 818, 666, 428])],
)
def test_whole_timesteps_are_cut_not_rounded(solver: str, timesteps: list[int]) -> None:
    assert make_schedule(solver, 5, 3.0).timesteps.tolist() == timesteps


def test_framepack_visits_the_sigmas_of_euler_and_is_fed_them_exactly() -> None:
    schedule, even = make_schedule("unipc-bh1", 25, 7.0), make_schedule("euler", 25, 7.0)
    assert torch.equal(schedule.sigmas, even.sigmas)
    assert torch.equal(schedule.timesteps, 1000 * even.sigmas[:-1])
    assert not torch.equal(schedule.timesteps, schedule.timesteps.floor())


def test_a_schedule_says_how_much_data_is_left() -> None:
    flow, table = make_schedule("unipc", 5, 3.0), make_schedule("unipc", 5, 3.0, (0.5, 1.0, 2.0))
    assert flow.alphas.tolist() == [1.0 - sigma for sigma in flow.sigmas.tolist()]  # exact: float64
    assert table.alphas.tolist() == [1.0] * 6
    assert table.sigmas.tolist() == [2.0, 1.5, 1.0, 0.75, 0.5, 0.0]
    assert table.timesteps.tolist() == [2.0, 1.5, 1.0, 0.5, 0.0]


def test_latents_are_kept_where_alphas_say_so() -> None:
    latents, noise = torch.full((2, 1, 1, 1, 1), 2.0), torch.ones(2, 1, 1, 1, 1)
    assert add_noise(latents, noise, torch.tensor([0.5, 10.0]), torch.ones(2)).flatten().tolist() == [
        2.5,
        12.0,
    ]
