"""Samplers against plain loops over diffusers' schedulers; start noise; Gradual Latent."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from modules.errors import OptionError
from stable_diffusion.contract import ImageSettings, RequestedImage
from stable_diffusion.samplers import SchedulerSolver, begin_sampling, count_skipped_steps, make_scheduler
from stable_diffusion.sampling_options import SAMPLERS, GradualLatentOptions, StartNoiseOptions, Unsharp
from stable_diffusion.small_start import begin_small, check_batch, plan_growth, scale_size
from stable_diffusion.starting import add_offset, add_pyramid, vary_noise
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
    for index in range(solver.first_index, solver.schedule.num_steps):
        seen = solver.model_input(index, latents.squeeze(2))
        said = network(seen, float(solver.schedule.timesteps[index]))
        latents = solver.step(index, said.unsqueeze(2), latents)
    return latents.squeeze(2)


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
    solver = begin_sampling(make_scheduler("pndm", False), 20, generators(1, 2), 16)
    clean = 0.5 * noise(1)
    latents = solver.add_noise(solver.first_index, clean, noise()).unsqueeze(2)
    for index in range(solver.first_index, solver.schedule.num_steps):
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
        wanted, drawn = noise() * theirs.init_noise_sigma, generators(1, 2)
        given = {"generator": drawn} if "generator" in theirs.step.__code__.co_varnames else {}
        for timestep in theirs.timesteps:  # as diffusers' pipelines do
            said = network(theirs.scale_model_input(wanted, timestep), float(timestep))
            wanted = theirs.step(said, timestep, wanted, **given).prev_sample
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)


def test_steps_offset() -> None:
    for offset, last in ((1, 1), (0, 0)):
        scheduler = make_scheduler("ddim", False, steps_offset=offset)
        assert begin_sampling(scheduler, 10, generators(1)).schedule.timesteps[-1] == last


def draw(seed: int) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 24, 16, generator=generator), generator


def test_nothing_is_drawn_by_what_is_not_asked_for() -> None:
    pyramid = StartNoiseOptions(pyramid_noise_prob=0.0, pyramid_noise_discount_range=(0.1, 0.2))
    offset = StartNoiseOptions(noise_offset_prob=0.0, noise_offset_range=(0.1, 0.2))
    for options in (StartNoiseOptions(), pyramid, offset):
        noise, generator = draw(1)
        state = generator.get_state()
        assert vary_noise(noise, options, generator) is noise
        assert torch.equal(generator.get_state(), state)


def test_an_offset_is_one_number_for_each_channel_of_the_size_that_is_asked_for() -> None:
    noise, generator = draw(1)
    options = StartNoiseOptions(noise_offset_prob=1.0, noise_offset_range=(0.5, 0.5))
    shift = vary_noise(noise, options, generator) - noise
    torch.testing.assert_close(shift, shift[:, :1, :1].expand_as(shift))
    shifts = torch.stack([add_offset(torch.zeros(4, 1, 1), 0.3, generator) for _ in range(1000)])
    assert shifts.std().item() == pytest.approx(0.3, rel=0.05)


def test_pyramid_noise_is_coarser_and_as_strong() -> None:
    def roughness(noise: Tensor) -> float:
        return float((noise[:, 1:] - noise[:, :-1]).square().mean() / noise.var())

    options = StartNoiseOptions(pyramid_noise_prob=1.0, pyramid_noise_discount_range=(0.8, 0.9))
    for seed in range(5):
        noise, generator = draw(seed)
        pyramid = vary_noise(noise, options, generator)
        assert pyramid.shape == noise.shape
        assert pyramid.std().item() == pytest.approx(1, abs=1e-4)
        assert roughness(pyramid) < 0.8 * roughness(noise)
    torch.testing.assert_close(add_pyramid(noise, 0.0, generator), noise / noise.std())


def test_a_probability_is_the_share_of_pictures() -> None:
    options = StartNoiseOptions(noise_offset_prob=0.25, noise_offset_range=(1.0, 2.0))
    changed = [
        vary_noise(noise, options, generator) is not noise for noise, generator in map(draw, range(400))
    ]
    assert sum(changed) == pytest.approx(100, abs=30)
    for seed in (1, 2):
        once, again = (vary_noise(*(draw(seed)[0], options, draw(seed)[1])) for _ in range(2))
        assert torch.equal(once, again)


GRADUAL = GradualLatentOptions(
    gradual_latent_timesteps=750, gradual_latent_ratio_step=0.25, gradual_latent_every_n_steps=2
)
SEEDS = (5, 6)
GROWING = 8


def output_of(sample: Tensor) -> Tensor:
    """What stands for the U-Net: it depends on the neighbors too."""
    return torch.tanh(sample + 0.3 * sample.roll(1, -1))


def start(seeds: Sequence[int] = SEEDS) -> Tensor:
    noise = [
        torch.randn(1, 4, 1, 32, 40, generator=torch.Generator().manual_seed(seed + 9)) for seed in seeds
    ]
    return torch.cat(noise) * 14.6


def sampled(
    gradual: GradualLatentOptions, velocity: bool = False, seeds: Sequence[int] = SEEDS
) -> list[Tensor]:
    """All samples on the way, by our solver."""
    inner = begin_sampling(make_scheduler("euler_a", velocity), GROWING, generators(*seeds))
    small, solver = begin_small(start(seeds), inner, gradual)
    samples = [small]
    for index in range(solver.schedule.num_steps):
        output = output_of(solver.model_input(index, samples[-1]))
        samples.append(solver.step(index, output, samples[-1]))
    return samples


def test_pictures_that_cannot_begin_smaller_are_told(caplog: pytest.LogCaptureFixture) -> None:
    inner = begin_sampling(make_scheduler("euler_a", False), GROWING, generators(5))
    small, _ = begin_small(start([5])[..., :8, :8], inner, GRADUAL)

    assert small.shape[-2:] == (8, 8)
    (told,) = caplog.messages
    assert told.startswith("--gradual_latent_timesteps (--glt) does nothing for 64 x 64 pixels")


def computed(gradual: GradualLatentOptions, velocity: bool = False) -> list[Tensor]:
    """The same in plain words, without a solver or a plan."""
    scheduler: Any = make_scheduler("euler_a", velocity)
    scheduler.set_timesteps(GROWING)
    draw, every = generators(*SEEDS), gradual.gradual_latent_every_n_steps
    ratio, waited, unsharp = gradual.gradual_latent_ratio, every, gradual.unsharp
    x = bicubic(start().squeeze(2), ratio)
    samples = [x]
    for sigma, following, t in zip(scheduler.sigmas, scheduler.sigmas[1:], scheduler.timesteps, strict=False):
        output = output_of((x / (sigma**2 + 1) ** 0.5).unsqueeze(2)).squeeze(2)
        if velocity:
            clean = x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5
        else:
            clean = x - sigma * output
        d = (x - clean) / sigma
        up = (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5
        dt = (following**2 - up**2) ** 0.5 - sigma
        strength = 1.0
        if t < gradual.gradual_latent_timesteps and ratio < 1 and waited >= every:
            ratio, waited = min(1.0, ratio + gradual.gradual_latent_ratio_step), 0
            strength = gradual.gradual_latent_s_noise
            if unsharp is None or unsharp.sharpens_result:
                x = unsharped(bicubic(x + d * dt, ratio), unsharp)
            else:
                x = unsharped(bicubic(x, ratio), unsharp) + bicubic(d, ratio) * dt
        else:
            x = x + d * dt
        waited += 1
        noise = torch.cat([torch.randn(1, *x.shape[1:], generator=each) for each in draw])
        x = x + noise * up * strength
        samples.append(x)
    return samples


def bicubic(latents: Tensor, ratio: float) -> Tensor:
    sides = [int(side * ratio) // 8 * 8 for side in (32, 40)]
    return interpolate(latents, sides, mode="bicubic", align_corners=False)


def unsharped(latents: Tensor, unsharp: Unsharp | None) -> Tensor:
    if unsharp is None:
        return latents
    return latents + (latents - blur(latents, unsharp.ksize, unsharp.sigma)) * unsharp.strength


def blur(latents: Tensor, ksize: int, sigma: float) -> Tensor:
    """A Gaussian of ksize by ksize places, one neighbor after the other; edges are mirrored."""
    edge, (height, width) = ksize // 2, latents.shape[-2:]
    mirrored = np.pad(latents.numpy(), ((0, 0), (0, 0), (edge, edge), (edge, edge)), mode="reflect")
    total, weights = torch.zeros_like(latents), 0.0
    for row in range(ksize):
        for column in range(ksize):
            weight = math.exp(-((row - edge) ** 2 + (column - edge) ** 2) / (2 * sigma**2))
            total += weight * torch.from_numpy(mirrored[..., row : row + height, column : column + width])
            weights += weight
    return total / weights


@pytest.mark.parametrize(
    ("gradual", "velocity"),
    [
        (GRADUAL, False),
        (replace(GRADUAL, gradual_latent_s_noise=0.7, gradual_latent_every_n_steps=1), True),
        (replace(GRADUAL, gradual_latent_unsharp_params="3,0.5,0.8,1"), False),
        (replace(GRADUAL, gradual_latent_unsharp_params="5,1.5,0.5,0", gradual_latent_s_noise=1.1), True),
    ],
)
def test_steps_are_those_of_the_plain_computation(gradual: GradualLatentOptions, velocity: bool) -> None:
    ours, plain = sampled(gradual, velocity), computed(gradual, velocity)
    assert [tuple(sample.shape[-2:]) for sample in ours] == [tuple(sample.shape[-2:]) for sample in plain]
    assert ours[-1].shape == (2, 4, 1, 32, 40)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.squeeze(2), theirs, atol=2e-5, rtol=1e-5)


def test_growth_begins_below_the_timestep_and_is_counted_from_there() -> None:
    gradual = GradualLatentOptions(gradual_latent_timesteps=700, gradual_latent_ratio_step=0.1)
    timesteps = [float(t) for t in range(950, 0, -50)]
    growth = plan_growth(timesteps, gradual)
    assert [timesteps[index] for index in growth] == [650, 500, 350, 200, 50]
    assert [round(ratio, 6) for ratio in growth.values()] == [0.6, 0.7, 0.8, 0.9, 1.0]
    assert scale_size((65, 128), 0.1 * 7) == (40, 88)
    assert scale_size((65, 128), 0.1 + 0.2 + 0.7) == (65, 128)
    assert scale_size((8, 12), 0.5) == (8, 8)


def test_too_few_steps_are_said(caplog: pytest.LogCaptureFixture) -> None:
    sampled(replace(GRADUAL, gradual_latent_ratio_step=0.25, gradual_latent_every_n_steps=6))
    assert "ends at 192 x 192 pixels instead of 320 x 256" in caplog.text


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(OptionError, match="blur of 51"):
        sampled(replace(GRADUAL, gradual_latent_unsharp_params="51,3,0.8"))
    image = RequestedImage("line 3", "a", "", 1, ImageSettings(64, 64, 4, 7.5, gradual_latent=GRADUAL), "a")
    check_batch([image], "k_euler_a")
    with pytest.raises(OptionError, match="line 3.*euler_a only, not with ddim"):
        check_batch([image], "ddim")
    with pytest.raises(OptionError, match="line 3.*mask"):
        check_batch([replace(image, mask=image.label)], "euler_a")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("strength", "left_out"), [(None, None), (1.0, 0), (0.29, 8), (0.5, 5), (0.05, 10), (0.0, 10)]
)
def test_steps_that_image_to_image_leaves_out(strength: float | None, left_out: int | None) -> None:
    # diffusers: init_timestep = min(int(num_inference_steps * strength), num_inference_steps)
    assert count_skipped_steps(10, strength) == left_out


@pytest.mark.parametrize("sampler", ["dpm_2", "heun", "euler"])
def test_image_to_image_begins_at_a_whole_step(sampler: str) -> None:
    solver = begin_sampling(make_scheduler(sampler, predicts_velocity=False), STEPS, [], num_skipped=2)

    first_timestep = solver.schedule.timesteps[solver.first_index]
    assert first_timestep == solver.step_timesteps[2]
