"""Schedules, and the solvers against recorded trajectories, diffusers, and a solution in closed form."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy
import pytest
import torch
from torch import Tensor

from modules.flow.schedule import add_noise, make_schedule, shift_sigmas, size_shift
from modules.flow.solvers import UniPC, solver_for
from tests.golden_cases import read_case

NAMES = {"euler": "euler", "unipc": "unipc", "dpmpp": "dpm++"}
CASE, TENSORS = read_case("schedulers")
FRAMEPACK, FRAMEPACK_TENSORS = read_case("framepack_schedule")
# the released code computes its coefficients in float32, here they are float64: 25 steps of rounding, of
# values up to 2.5. The other B(h) moves the shortest of the trajectories by 1e-4, another order all of them
# by 5e-3 (recorded tolerance: 3e-4)
FRAMEPACK_NEAR = 5e-6


def follow(name: str, steps: int, flow_shift: float, start: Tensor) -> list[Tensor]:
    """The trajectory of the recorded velocity field 0.1 x + sin(t / 1000)."""
    solver = solver_for(name, steps, flow_shift)
    samples = [start]
    for index, timestep in enumerate(solver.schedule.timesteps):
        velocity = 0.1 * samples[-1] + torch.sin(timestep / 1000)
        samples.append(solver.step(index, velocity, samples[-1]))
    return samples


@pytest.mark.parametrize("key", sorted(CASE["values"]))
def test_schedules_and_trajectories_equal_the_recorded_ones(key: str) -> None:
    kind, steps_text, shift_text = key.split("_")
    name, steps, flow_shift = NAMES[kind], int(steps_text[5:]), float(shift_text[5:])
    schedule = make_schedule(name, steps, flow_shift)

    torch.testing.assert_close(schedule.sigmas, TENSORS[f"{key}.sigmas"], atol=2e-6, rtol=0)
    tolerance = 1e-3 if kind == "euler" else 0.0
    torch.testing.assert_close(
        schedule.timesteps, TENSORS[f"{key}.timesteps"].float(), atol=tolerance, rtol=0
    )
    samples = torch.stack([sample.flatten() for sample in follow(name, steps, flow_shift, TENSORS["x0"])])
    torch.testing.assert_close(
        samples, TENSORS[f"{key}.trajectory"].reshape(samples.shape), atol=2e-4, rtol=0
    )


@pytest.mark.parametrize("case", FRAMEPACK["sampler_cases"], ids=lambda case: str(case["latent"]))
def test_framepack_follows_the_recorded_trajectories(case: dict[str, Any]) -> None:
    name = f"lat{'x'.join(map(str, case['latent']))}_steps{case['steps']}"
    solver = solver_for("unipc-bh1", case["steps"], math.exp(case["mu"]))
    assert isinstance(solver, UniPC)
    sample, corrected = FRAMEPACK_TENSORS["x0"], []

    for index, timestep in enumerate(solver.schedule.timesteps):
        sample = solver.step(index, 0.1 * sample + torch.sin(timestep / 1000), sample)
        assert solver.corrected is not None
        corrected.append(solver.corrected.flatten())

    expected = FRAMEPACK_TENSORS[f"{name}.trajectory"]
    torch.testing.assert_close(torch.stack(corrected), expected, atol=FRAMEPACK_NEAR, rtol=0)
    torch.testing.assert_close(sample, FRAMEPACK_TENSORS[f"{name}.result"], atol=FRAMEPACK_NEAR, rtol=0)


def recorded_draws(seed: int) -> Callable[[Sequence[int]], Tensor]:
    """A source of noise that is the same for ours and for theirs."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(*shape, generator=generator)


def wavy(sample: Tensor) -> Tensor:
    return torch.cos(3 * sample) - sample


THEIRS = {
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}


@pytest.mark.parametrize(("name", "first"), [("unipc", 0), ("dpm++", 0), ("dpm++sde", 0), ("dpm++sde", 1)])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_steps_equal_those_of_diffusers_on_the_same_sigmas_and_noise(
    name: str, first: int, steps: int
) -> None:
    """Also from a later step, for video-to-video. At sigma 0 they draw too, but noise counts 0."""
    kind, settings = THEIRS[name]
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "final_sigmas_type": "zero"}
    theirs = getattr(diffusers, kind)(**flow, **settings, solver_order=2)
    draws = recorded_draws(1)
    solver = solver_for(name, steps + first, 5.0, draw=recorded_draws(1))
    theirs.set_timesteps(steps + first)
    theirs.sigmas, theirs.timesteps = solver.schedule.sigmas, solver.schedule.timesteps.long()
    theirs.set_begin_index(first)
    ours = expected = recorded_draws(0)((1, 4, 2, 3, 3))

    for index in range(first, steps + first):
        noise = {"variance_noise": draws(ours.shape)} if name == "dpm++sde" else {}
        ours = solver.step(index, wavy(ours), ours)
        expected = theirs.step(wavy(expected), theirs.timesteps[index], expected, return_dict=False, **noise)[
            0
        ]

    assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_equals_diffusers_on_levels_of_its_own(steps: int) -> None:
    solver = solver_for("lcm", steps, 5.0, draw=recorded_draws(1))
    theirs = diffusers.FlowMatchLCMScheduler(shift=5.0)
    theirs.set_timesteps(sigmas=torch.linspace(1, 1 / 1000, steps).tolist())
    torch.testing.assert_close(solver.schedule.sigmas, theirs.sigmas, atol=1e-6, rtol=0)
    torch.testing.assert_close(solver.schedule.timesteps, theirs.timesteps, atol=1e-3, rtol=0)
    generator = torch.Generator().manual_seed(1)
    ours = expected = recorded_draws(0)((1, 4, 2, 3, 3))

    for index, timestep in enumerate(theirs.timesteps):
        ours = solver.step(index, wavy(ours), ours)
        expected = theirs.step(wavy(expected), timestep, expected, generator=generator, return_dict=False)[0]

    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def noise_table() -> tuple[float, ...]:
    """Sigmas of the 1000 timesteps of Stable Diffusion 1: sqrt((1 - abar) / abar), betas even in their
    roots.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    data = (1 - betas).cumprod(0)
    return tuple(((1 - data) / data).sqrt().tolist())


TABLE = noise_table()


@pytest.mark.parametrize("name", ["euler", "unipc", "dpm++"])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_a_model_that_predicts_noise_is_followed_as_diffusers_does(name: str, steps: int) -> None:
    """Theirs, except Euler, weaken latents as noise is added: divided by their share they are ours.

    Float32 on both sides; measured: at most 1e-6 of the largest value.
    """
    final = {} if name == "euler" else {"final_sigmas_type": "zero"}
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    kind = "EulerDiscreteScheduler" if name == "euler" else THEIRS[name][0]
    how = {"timestep_spacing": "linspace", "prediction_type": "epsilon"}
    theirs = getattr(diffusers, kind)(**betas, **final, **how)
    solver = solver_for(name, steps, 1.0, TABLE)
    theirs.set_timesteps(steps)
    theirs.sigmas, theirs.timesteps = solver.schedule.sigmas, solver.schedule.timesteps

    def predict(sample: Tensor, sigma: float) -> Tensor:
        weakened = sample / math.sqrt(1 + sigma**2)
        return torch.tanh(weakened) + 0.3 * torch.cos(3 * weakened)

    sigmas = solver.schedule.sigmas.tolist()
    start = sigmas[0] * torch.randn(1, 4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    share = 1.0 if name == "euler" else 1 / math.sqrt(1 + sigmas[0] ** 2)
    ours, expected = start, share * start
    for index, timestep in enumerate(solver.schedule.timesteps):
        share = 1.0 if name == "euler" else 1 / math.sqrt(1 + sigmas[index] ** 2)
        noise = predict(expected / share, sigmas[index])
        expected = theirs.step(noise, timestep, expected, return_dict=False)[0]
        ours = solver.step(index, predict(ours, sigmas[index]), ours)

    assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["euler", "unipc", "unipc-bh1", "dpm++", "dpm++sde", "lcm"])
@pytest.mark.parametrize(
    ("table", "first"), [(TABLE, 0), (None, 0), (None, 4)], ids=["table", "flow", "from 4"]
)
def test_a_constant_clean_estimate_is_reached_from_any_step(
    name: str, table: tuple[float, ...] | None, first: int
) -> None:
    data, noise = torch.full((1, 2, 1, 2, 2), 0.5), torch.full((1, 2, 1, 2, 2), -1.0)
    solver = solver_for(name, 6, 3.0, table, draw=recorded_draws(1))
    sigmas = solver.schedule.sigmas
    sample = add_noise(data, noise, sigmas[first, None], solver.schedule.alphas[first, None].float())

    for index in range(first, 6):
        sample = solver.step(index, (sample - data) / sigmas[index], sample)

    torch.testing.assert_close(sample, data, atol=1e-4 if table else 1e-5, rtol=0)


def order_of(name: str, deviation: float, share: float) -> float:
    """The power of the number of steps with which the error falls, where the whole path is known: of data
    that are normal.

    Noise of 1 becomes sqrt((deviation (1 - sigma))^2 + sigma^2); the velocity is linear in the sample. share:
    of the path that is gone. From 16 to 64 steps, where errors are well above float32's.
    """

    def error(steps: int) -> float:
        solver = solver_for(name, steps, 1.0)
        sigmas = solver.schedule.sigmas.tolist()[: int(share * steps) + 1]
        spread = [deviation**2 * (1 - sigma) ** 2 + sigma**2 for sigma in sigmas]
        sample = torch.full((1, 1, 1, 1, 1), math.sqrt(spread[0]))
        for index, sigma in enumerate(sigmas[:-1]):
            sample = solver.step(index, (sigma - deviation**2 * (1 - sigma)) / spread[index] * sample, sample)
        return abs(float(sample) - math.sqrt(spread[-1]))

    return math.log(error(16) / error(64), 4)


@pytest.mark.parametrize(("name", "at_least"), [("unipc", 2.5), ("unipc-bh1", 2.5), ("dpm++", 1.7)])
def test_the_error_half_way_falls_with_more_than_the_first_power_of_the_steps(
    name: str, at_least: float
) -> None:
    assert 0.9 < order_of("euler", 0.5, 0.5) < 1.1
    assert order_of(name, 0.5, 0.5) > at_least


@pytest.mark.parametrize("name", ["unipc", "unipc-bh1"])
def test_the_way_into_sigma_0_costs_no_more_than_the_second_power(name: str) -> None:
    assert 0.9 < order_of("euler", 2.0, 1.0) < 1.1
    # its length falls with the steps, and so does what x0 changes on it
    assert order_of(name, 2.0, 1.0) > 1.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_blend_is_linear_in_the_sigma_of_each_sample_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    latents = torch.full((3, 16, 3, 4, 4), 2.0, dtype=dtype)
    sigmas, blended = torch.tensor([0.0, 0.25, 1.0]), torch.tensor([2.0, 1.0, -2.0])
    kept = torch.tensor([2.0, 1.5, 0.0])  # latents stay whole where alphas say so

    noisy = add_noise(latents, -latents, sigmas)

    assert torch.equal(noisy, latents * blended.to(dtype).view(3, 1, 1, 1, 1) / 2)
    noisy = add_noise(latents, -latents, sigmas, torch.ones(3))
    assert torch.equal(noisy, latents * kept.to(dtype).view(3, 1, 1, 1, 1) / 2)


def test_the_shift_keeps_both_ends_and_1_changes_nothing() -> None:
    sigmas = torch.linspace(0, 1, 5)
    torch.testing.assert_close(shift_sigmas(sigmas, 1.0), sigmas)
    shifted = shift_sigmas(sigmas, 5.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert float(shifted[2]) == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("solver", "timesteps"), [("unipc", [999, 922, 817, 666, 428]), ("dpm++", [1000, 923, 818, 666, 428])]
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


@pytest.mark.parametrize(("tokens", "steps"), [(1024, 8), (4096, 40), (6144, 30), (100, 2)])
def test_the_stretched_shift_is_that_of_diffusers(tokens: int, steps: int) -> None:
    """Those of LTX-2's release: mu on a line through the numbers of tokens, and a last level of a tenth."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.1, time_shift_type="exponential"
    )
    few, many = (1024, 0.95), (4096, 2.05)
    mu = diffusers.pipelines.ltx2.pipeline_ltx2.calculate_shift(tokens, few[0], many[0], few[1], many[1])
    scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / steps, steps), mu=mu)

    schedule = make_schedule("euler-tenth", steps, size_shift(tokens, few, many))

    torch.testing.assert_close(schedule.sigmas, scheduler.sigmas, atol=1e-6, rtol=0)
    torch.testing.assert_close(schedule.timesteps, scheduler.timesteps, atol=1e-3, rtol=0)
    assert float(schedule.sigmas[-2]) == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
def test_given_levels_replace_those_of_any_solver_and_may_begin_at_pure_noise(solver: str) -> None:
    levels = (1.0, 0.975, 0.725, 0.421875, 0.0)

    schedule = make_schedule(solver, 4, 7.0, levels=levels)

    assert schedule.sigmas.tolist() == pytest.approx(levels)
    assert schedule.timesteps.tolist() == pytest.approx([1000 * level for level in levels[:-1]])
    stepper, sample = solver_for(solver, 4, 7.0, levels=levels), torch.ones(1, 1, 1, 1, 1)
    for index in range(4):
        sample = stepper.step(index, 0.3 * sample, sample)
    assert sample.isfinite().all()


@pytest.mark.parametrize("levels", [(1.0, 0.0), (1.0, 0.5, 0.1), (0.5, 1.0, 0.0)])
def test_levels_that_do_not_fall_to_0_or_are_too_few_are_an_error(levels: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="2 steps with the noise levels"):
        make_schedule("euler", 2, 1.0, levels=levels)
