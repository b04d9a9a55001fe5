"""Rectified flow: the straight path between data and noise, the time shift, a solver's noise levels.

A noisy sample is `alpha * latents + sigma * noise`. For a flow, alpha is 1 - sigma, and the network predicts
the velocity `noise - latents`. For a model that predicts noise, alpha is 1 (k-diffusion's form), and the
velocity is the noise. In both the velocity is the derivative of the sample by sigma, and `sample - sigma *
velocity` is the clean estimate.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000  # a network is fed sigma * TRAIN_TIMESTEPS
ROUNDING = 1e-6  # rounding error of a noise level in float32

# Wan's released UniPC starts from the training table, whose noisiest entry is 1 - 1/1000, kept in float32
_NOISIEST_TRAINED_SIGMA = float(np.float32(1.0 - 1.0 / TRAIN_TIMESTEPS))


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a solver's run, from noise to data."""

    sigmas: Tensor  # N + 1, float32, decreasing to 0
    timesteps: Tensor  # N, float32: what the network is fed at each step
    alphas: Tensor  # N + 1, float64: weight of the data at each sigma
    audio_sigmas: Tensor | None = None  # N + 1: sigmas of a clip's audio; None: as `sigmas`

    @property
    def num_steps(self) -> int:
        """Number of denoising steps."""
        return len(self.timesteps)


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor, alphas: Tensor | None = None) -> Tensor:
    """Blend latents with noise, along the straight path of rectified flow unless `alphas` is given.

    `latents` and `noise` are B C F H W in model space. `sigmas` is B, from 0 (clean) to 1 (pure noise).
    `alphas` is B, factors of the latents; None means 1 - sigmas. Returns B C F H W in the dtype of `latents`;
    the blend is computed in float32. Source: Liu et al. 2022, arXiv 2209.03003.

    Raises:
        ValueError: If the batch sizes differ.
    """
    if not len(latents) == len(noise) == len(sigmas):
        raise ValueError(
            f"batch sizes differ: {len(latents)} latents, {len(noise)} noise, {len(sigmas)} sigmas"
        )
    per_item = (-1, *([1] * (latents.ndim - 1)))  # B 1 1 1 1
    sigmas = sigmas.float().view(per_item)
    alphas = 1 - sigmas if alphas is None else alphas.float().view(per_item)
    return (alphas * latents.float() + sigmas * noise.float()).to(latents.dtype)


def noisy_source(source: Tensor, noise: Tensor, schedule: Schedule, step: int) -> Tensor:
    """Mix clean latents with noise, both B C F H W, at the noise level of a step.

    A noise level within rounding of 1 gives pure noise.
    """
    if abs(1 - schedule.sigmas[step]) <= ROUNDING and schedule.alphas[step] <= ROUNDING:
        return noise
    sigmas, alphas = (
        levels[step].float().expand(len(noise)).to(noise.device)
        for levels in (schedule.sigmas, schedule.alphas)
    )
    return add_noise(source.float(), noise, sigmas, alphas)


def size_shift(tokens: int, few: tuple[int, float], many: tuple[int, float]) -> float:
    """Return the flow shift e^mu for an image of `tokens` tokens.

    `few` and `many` are two points (number of tokens, mu); mu is interpolated linearly. Source: the FLUX.1
    reference code.
    """
    slope = (many[1] - few[1]) / (many[0] - few[0])
    return math.exp(few[1] + slope * (tokens - few[0]))


def shift_sigmas(sigmas: Tensor, flow_shift: float) -> Tensor:
    """Shift noise levels towards 1 if flow_shift is above 1; 0 and 1 do not change.

    More steps are then spent at high noise, which decides the composition of the image. `sigmas` may have any
    shape and dtype.

    Source: Esser et al. 2024, arXiv 2403.03206, section 5.3.2.
    """
    return flow_shift * sigmas / (1 + (flow_shift - 1) * sigmas)


def make_schedule(
    solver: str,
    steps: int,
    flow_shift: float,
    table: Sequence[float] = (),
    levels: Sequence[float] = (),
) -> Schedule:
    """Return the noise levels that a solver of `modules.flow.solvers` visits in `steps` steps.

    1. `levels`, if given, are the noise levels themselves.
    2. Else a `table` (the sigma of each training timestep) is read at timesteps that are evenly spaced from
       the last one to 0, without a shift.
    3. Else the grid of the solver is shifted by `flow_shift`. Euler, unipc-bh1 and lcm feed exact timesteps
       to the model; the other solvers feed truncated timesteps but step by the exact sigmas, as the
       released code does.

    Raises:
        ValueError: For an unknown solver, if steps is below 1, or if `levels` are given and are not `steps`
            decreasing numbers followed by 0.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps: at least one is needed")
    if solver not in _GRIDS:
        raise ValueError(f"unknown solver {solver!r}: one of {', '.join(_GRIDS)}")
    if levels:
        is_falling = all(level > next_level for level, next_level in itertools.pairwise(levels))
        if len(levels) != steps + 1 or levels[-1] != 0 or not is_falling:
            raise ValueError(f"{steps} steps with the noise levels {', '.join(map(str, levels))}")
        sigmas = torch.tensor(levels, dtype=torch.float32)
        return flow_schedule(sigmas, sigmas[:-1] * TRAIN_TIMESTEPS)
    if not table:
        return _GRIDS[solver](steps, flow_shift)
    timesteps = np.linspace(len(table) - 1, 0, steps)
    table_sigmas = np.append(np.interp(timesteps, np.arange(len(table)), table), 0.0)
    return Schedule(
        torch.from_numpy(table_sigmas).float(),
        torch.from_numpy(timesteps).float(),
        torch.ones(steps + 1, dtype=torch.float64),  # noise is added to the data without scaling them
    )


def flow_schedule(sigmas: Tensor, timesteps: Tensor) -> Schedule:
    """Return the schedule of a rectified flow, where the clean latents have weight 1 - sigma.

    Args:
        sigmas: Noise levels, N + 1 float32.
        timesteps: Timesteps given to the network, N float32.
    """
    return Schedule(sigmas, timesteps, 1 - sigmas.double())


def _make_even_grid(lowest: float, keeps_lowest: bool, steps: int, flow_shift: float) -> Schedule:
    # evenly from 1 down to `lowest`, which is the last level before 0, or is left out for 0
    levels = torch.linspace(1, lowest, steps + (not keeps_lowest), dtype=torch.float32)[:steps]
    sigmas = shift_sigmas(levels, flow_shift)
    return flow_schedule(torch.cat([sigmas, sigmas.new_zeros(1)]), sigmas * TRAIN_TIMESTEPS)


def _make_terminal_grid(terminal: float, steps: int, flow_shift: float) -> Schedule:
    # stretched after the shift, so that the last level before 0 is `terminal`
    levels = stretch_levels(torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1], flow_shift, terminal)
    sigmas = torch.cat([levels, levels.new_zeros(1)]).float()
    return flow_schedule(sigmas, (levels * TRAIN_TIMESTEPS).float())


def stretch_levels(levels: Tensor, flow_shift: float, terminal: float) -> Tensor:
    """Shift noise levels, then stretch them so that the last level is `terminal`.

    `levels` are N decreasing values in float64 that begin with 1 and do not include the final 0. A single
    level stays 1.
    Source: `shift_terminal` of diffusers' FlowMatchEulerDiscreteScheduler.
    """
    levels = shift_sigmas(levels, flow_shift)
    return levels if len(levels) == 1 else 1 - (1 - levels) * (1 - terminal) / (1 - levels[-1])


def _make_trained_grid(steps: int, flow_shift: float) -> Schedule:
    # between the ends of the training table, whose lower end is shifted before and after it is spread:
    # as diffusers' FlowMatchEulerDiscreteScheduler does without given sigmas
    low = shift_sigmas(torch.tensor(1 / TRAIN_TIMESTEPS, dtype=torch.float64), flow_shift)
    levels = torch.from_numpy(np.linspace(1.0, float(low), steps))
    sigmas = shift_sigmas(levels, flow_shift)
    return flow_schedule(torch.cat([sigmas, sigmas.new_zeros(1)]).float(), (sigmas * TRAIN_TIMESTEPS).float())


def _make_integer_timesteps(noisiest: float, steps: int, flow_shift: float) -> Schedule:
    # float64: in float32 0.75 * 1000 may come out as 749.99 and be cut to 749
    grid = torch.from_numpy(np.linspace(noisiest, 0.0, steps + 1)[:-1])
    sigmas = shift_sigmas(grid, flow_shift)
    timesteps = (sigmas * TRAIN_TIMESTEPS).to(torch.int64).float()
    return flow_schedule(torch.cat([sigmas, sigmas.new_zeros(1)]).float(), timesteps)


_GRIDS: dict[str, Callable[[int, float], Schedule]] = {
    "euler": partial(_make_even_grid, 0.0, False),
    "euler-trained": _make_trained_grid,
    # `shift_terminal` of the releases of Qwen-Image and of LTX-2
    "euler-terminal": partial(_make_terminal_grid, 0.02),
    "euler-tenth": partial(_make_terminal_grid, 0.1),
    "euler-thousandth": partial(_make_even_grid, 1 / TRAIN_TIMESTEPS, False),
    "unipc": partial(_make_integer_timesteps, _NOISIEST_TRAINED_SIGMA),
    "unipc-bh1": partial(_make_even_grid, 0.0, False),
    "dpm++": partial(_make_integer_timesteps, 1.0),
    "dpm++sde": partial(_make_integer_timesteps, 1.0),
    # down to the lowest timestep that models are trained on, from which the last jump goes to 0
    "lcm": partial(_make_even_grid, 1 / TRAIN_TIMESTEPS, True),
}
