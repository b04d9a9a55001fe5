"""Gradual Latent against a plain computation of its steps, and as euler_a where nothing grows."""

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
from stable_diffusion.contract import AskedPicture, PictureSettings
from stable_diffusion.samplers import begin_sampling, make_scheduler
from stable_diffusion.sampling_options import GradualLatentOptions, Unsharp
from stable_diffusion.small_start import begin_small, check_batch, plan_growth, size_at

GRADUAL = GradualLatentOptions(
    gradual_latent_timesteps=750, gradual_latent_ratio_step=0.25, gradual_latent_every_n_steps=2
)
SEEDS = (5, 6)
STEPS = 8


def output_of(sample: Tensor) -> Tensor:
    """What stands for the U-Net: it depends on the neighbours too."""
    return torch.tanh(sample + 0.3 * sample.roll(1, -1))


def generators(seeds: Sequence[int] = SEEDS) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def start(seeds: Sequence[int] = SEEDS, height: int = 32, width: int = 40) -> Tensor:
    noise = [
        torch.randn(1, 4, 1, height, width, generator=torch.Generator().manual_seed(seed + 9))
        for seed in seeds
    ]
    return torch.cat(noise) * 14.6


def sampled(
    gradual: GradualLatentOptions, velocity: bool = False, seeds: Sequence[int] = SEEDS
) -> list[Tensor]:
    """All samples on the way, by our solver."""
    inner = begin_sampling(make_scheduler("euler_a", velocity), STEPS, generators(seeds))
    small, solver = begin_small(start(seeds), inner, gradual)
    samples = [small]
    for index in range(solver.schedule.num_steps):
        output = output_of(solver.model_input(index, samples[-1]))
        samples.append(solver.step(index, output, samples[-1]))
    return samples


def computed(gradual: GradualLatentOptions, velocity: bool = False) -> list[Tensor]:
    """The same in plain words, without a solver or a plan."""
    scheduler: Any = make_scheduler("euler_a", velocity)
    scheduler.set_timesteps(STEPS)
    draw, ratio, waited = generators(), gradual.gradual_latent_ratio, gradual.gradual_latent_every_n_steps
    x = bicubic(start().squeeze(2), ratio)
    samples = [x]
    for sigma, sigma_next, t in zip(
        scheduler.sigmas, scheduler.sigmas[1:], scheduler.timesteps, strict=False
    ):
        output = output_of((x / (sigma**2 + 1) ** 0.5).unsqueeze(2)).squeeze(2)
        if velocity:
            clean = x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5
        else:
            clean = x - sigma * output
        d = (x - clean) / sigma
        up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
        dt = (sigma_next**2 - up**2) ** 0.5 - sigma
        grows, strength = (
            t < gradual.gradual_latent_timesteps
            and ratio < 1
            and waited >= gradual.gradual_latent_every_n_steps,
            1.0,
        )
        if grows:
            ratio, waited, strength = (
                min(1.0, ratio + gradual.gradual_latent_ratio_step),
                0,
                gradual.gradual_latent_s_noise,
            )
            if gradual.unsharp is None or gradual.unsharp.target_x:
                x = unsharped(bicubic(x + d * dt, ratio), gradual.unsharp)
            else:
                x = unsharped(bicubic(x, ratio), gradual.unsharp) + bicubic(d, ratio) * dt
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
    """A Gaussian of ksize by ksize places, one neighbour after the other; edges are mirrored."""
    edge, (height, width) = ksize // 2, latents.shape[-2:]
    mirrored = np.pad(latents.numpy(), ((0, 0), (0, 0), (edge, edge), (edge, edge)), mode="reflect")
    total, weights = torch.zeros_like(latents), 0.0
    for row in range(ksize):
        for column in range(ksize):
            weight = math.exp(-((row - edge) ** 2 + (column - edge) ** 2) / (2 * sigma**2))
            total += weight * torch.from_numpy(mirrored[..., row : row + height, column : column + width])
            weights += weight
    return total / weights


@pytest.mark.parametrize("velocity", [False, True])
@pytest.mark.parametrize(
    "gradual",
    [
        GRADUAL,
        replace(GRADUAL, gradual_latent_s_noise=0.7, gradual_latent_every_n_steps=1),
        replace(GRADUAL, gradual_latent_unsharp_params="3,0.5,0.8,1"),
        replace(GRADUAL, gradual_latent_unsharp_params="5,1.5,0.5,0", gradual_latent_s_noise=1.1),
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
    assert size_at((65, 128), 0.1 * 7) == (40, 88)
    assert size_at((65, 128), 0.1 + 0.2 + 0.7) == (65, 128)
    assert size_at((8, 12), 0.5) == (8, 8)


def test_too_few_steps_are_said(caplog: pytest.LogCaptureFixture) -> None:
    sampled(replace(GRADUAL, gradual_latent_ratio_step=0.25, gradual_latent_every_n_steps=6))
    assert "ends at 192 x 192 pixels instead of 320 x 256" in caplog.text


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(OptionError, match="blur of 51"):
        sampled(replace(GRADUAL, gradual_latent_unsharp_params="51,3,0.8"))
    picture = AskedPicture("line 3", "a", "", 1, PictureSettings(64, 64, 4, 7.5, gradual_latent=GRADUAL), "a")
    check_batch([picture], "k_euler_a")
    with pytest.raises(OptionError, match="line 3.*euler_a only, not with ddim"):
        check_batch([picture], "ddim")
    with pytest.raises(OptionError, match="line 3.*mask"):
        check_batch([replace(picture, mask=picture.label)], "euler_a")  # type: ignore[arg-type]
