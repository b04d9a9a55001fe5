"""Samplers against plain loops over diffusers' schedulers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from modules.errors import OptionError
from stable_diffusion.options import read_gen_img
from stable_diffusion.samplers import SchedulerSolver, begin_sampling, check_sampling, make_scheduler
from stable_diffusion.sampling_options import SAMPLERS
from tests.parity.stable_diffusion import generators, their_scheduler

SHAPE = (2, 4, 5, 3)
STEPS = 6
NAMES = [name for name in SAMPLERS if not name.startswith("k_")]


def network(sample: Tensor, timestep: float) -> Tensor:
    """Stand for a U-Net."""
    return torch.sin(3 * sample) + timestep / 1000


def follow(solver: SchedulerSolver, latents: Tensor) -> Tensor:
    """Denoise as the loop does."""
    latents = latents.unsqueeze(2)
    for index in range(solver.first, solver.schedule.num_steps):
        seen = solver.model_input(index, latents.squeeze(2))
        said = network(seen, float(solver.schedule.timesteps[index]))
        latents = solver.step(index, said.unsqueeze(2), latents)
    return latents.squeeze(2)


def follow_theirs(scheduler: Any, timesteps: Tensor, latents: Tensor, seeds: tuple[int, ...]) -> Tensor:
    """Denoise as diffusers' pipelines do."""
    drawn = generators(*seeds)
    draws = "generator" in scheduler.step.__code__.co_varnames
    for timestep in timesteps:
        said = network(scheduler.scale_model_input(latents, timestep), float(timestep))
        given = {"generator": drawn} if draws else {}
        latents = scheduler.step(said, timestep, latents, **given).prev_sample
    return latents


def noise(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sampler", NAMES)
def test_steps_of_a_picture_do_not_depend_on_its_batch(sampler: str) -> None:
    torch.manual_seed(0)
    scheduler = make_scheduler(sampler, False)
    both = begin_sampling(scheduler, STEPS, generators(1, 2))
    made = follow(both, noise() * both.noise_level)

    torch.manual_seed(99)  # what is drawn from nowhere in particular would change
    for number, seed in enumerate((1, 2)):
        alone = begin_sampling(scheduler, STEPS, generators(seed))  # forgets what it did before
        single = follow(alone, noise()[number : number + 1] * alone.noise_level)
        torch.testing.assert_close(made[number : number + 1], single, rtol=1e-5, atol=1e-5)


def test_pndm_from_a_picture_leaves_out_the_steps_that_need_pure_noise() -> None:
    """With them the predicted picture is far off: 2000 times as strong at a strength of 0.2."""
    solver = begin_sampling(make_scheduler("pndm", False), 20, generators(1, 2), 0.2)
    clean = 0.5 * noise(1)
    latents = solver.add_noise(solver.first, clean, noise()).unsqueeze(2)
    for index in range(solver.first, solver.schedule.num_steps):
        alpha, sigma = float(solver.schedule.alphas[index]), float(solver.schedule.sigmas[index])
        # what an ideal network says of data with a deviation of 0.5
        said = sigma * latents / (0.25 * alpha**2 + sigma**2)
        latents = solver.step(index, said, latents)
    assert latents.std() == pytest.approx(float(clean.std()), rel=0.1)


@pytest.mark.parametrize("sampler", NAMES)
def test_zero_terminal_snr_begins_with_noise_alone(sampler: str) -> None:
    """As in diffusers' own classes, where they have it; all begin at the last timestep of training."""
    solver = begin_sampling(make_scheduler(sampler, True, zero_terminal_snr=True), STEPS, generators(1, 2))
    assert float(solver.schedule.timesteps[0]) == 999
    assert float(solver.schedule.alphas[0]) < 3e-4
    made = follow(solver, noise() * solver.noise_level)
    assert bool(made.isfinite().all())
    if sampler in ("ddim", "euler", "euler_a", "dpmsolver", "dpmsolver++"):
        theirs = their_scheduler(sampler, True, rescale_betas_zero_snr=True, timestep_spacing="trailing")
        theirs.set_timesteps(STEPS)
        wanted = follow_theirs(theirs, theirs.timesteps, noise() * theirs.init_noise_sigma, (1, 2))
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)


def test_steps_offset() -> None:
    for offset, last in ((1, 1), (0, 0)):
        scheduler = make_scheduler("ddim", False, steps_offset=offset)
        assert begin_sampling(scheduler, 10, generators(1)).schedule.timesteps[-1] == last


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sampler pndm --steps 3", "--steps 3: --sampler pndm"),
        (
            "--sampler pndm --highres_fix_scale 0.5 --highres_fix_steps 3",
            "--highres_fix_steps 3: --sampler pndm",
        ),
        ("--steps 1000", "--steps 1000"),
        ("--zero_terminal_snr", "--zero_terminal_snr needs a model that predicts v"),
    ],
)
def test_what_cannot_be_sampled_is_refused(words: str, message: str) -> None:
    def act() -> None:
        options = read_gen_img(None, ["--ckpt", "x", "--prompt", "a", *words.split()])
        check_sampling(options.sampling, predicts_velocity=False)

    with pytest.raises((OptionError, SystemExit)) as caught:
        act()
    assert message in str(caught.value)
