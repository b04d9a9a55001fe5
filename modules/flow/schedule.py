"""Rectified flow: the straight path between data and noise, the time shift, a solver's noise levels.

A noisy sample is `(1 - sigma) * latents + sigma * noise`; the network predicts the velocity `noise -
latents`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000  # a network is fed sigma * TRAIN_TIMESTEPS

# Wan's released UniPC starts from the training table, whose noisiest entry is 1 - 1/1000, kept in float32
_NOISIEST_TRAINED_SIGMA = float(np.float32(1.0 - 1.0 / TRAIN_TIMESTEPS))


@dataclass(frozen=True)
class Schedule:
    """The noise levels of one run of a solver, from noise to data."""

    sigmas: Tensor  # N + 1, float32, falling; the last is 0
    timesteps: Tensor  # N, float32: what the network is fed at each step

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Blend latents with noise on the straight path that rectified flow trains on.

    latents, noise: B C F H W in model space. sigmas: B, from 0 (clean) to 1 (pure noise).
    Returns B C F H W in the dtype of `latents`; the blend is computed in float32.
    Raises ValueError where the batch sizes differ.
    Source: Liu et al. 2022, arXiv 2209.03003.
    """
    if not len(latents) == len(noise) == len(sigmas):
        raise ValueError(
            f"batch sizes differ: {len(latents)} latents, {len(noise)} noise, {len(sigmas)} sigmas"
        )
    weights = sigmas.float().view(-1, *([1] * (latents.ndim - 1)))
    return ((1 - weights) * latents.float() + weights * noise.float()).to(latents.dtype)


def shift_sigmas(sigmas: Tensor, flow_shift: float) -> Tensor:
    """Move noise levels towards 1 (flow_shift > 1: more steps where the picture is laid out); 0 and 1 stay.
    Any shape and dtype.

    Source: Esser et al. 2024, arXiv 2403.03206, section 5.3.2.
    """
    return flow_shift * sigmas / (1 + (flow_shift - 1) * sigmas)


def make_schedule(solver: str, steps: int, flow_shift: float) -> Schedule:
    """Return the noise levels that `solver` ("euler", "unipc", "unipc-bh1", "dpm++") visits in `steps` steps.

    euler and unipc-bh1 feed exact timesteps; unipc and dpm++ feed them cut to whole numbers but step by the
    exact sigmas, as the released code. Raises ValueError for an unknown solver or if steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps: at least one is needed")
    if solver not in _GRIDS:
        raise ValueError(f"unknown solver {solver!r}: one of {', '.join(_GRIDS)}")
    return _GRIDS[solver](steps, flow_shift)


def _even_grid(steps: int, flow_shift: float) -> Schedule:
    sigmas = shift_sigmas(torch.linspace(1, 0, steps + 1, dtype=torch.float32), flow_shift)
    return Schedule(sigmas, sigmas[:-1] * TRAIN_TIMESTEPS)


def _whole_timesteps(noisiest: float, steps: int, flow_shift: float) -> Schedule:
    # float64: in float32 0.75 * 1000 may come out as 749.99 and be cut to 749
    grid = torch.from_numpy(np.linspace(noisiest, 0.0, steps + 1)[:-1])
    sigmas = shift_sigmas(grid, flow_shift)
    timesteps = (sigmas * TRAIN_TIMESTEPS).to(torch.int64).float()
    return Schedule(torch.cat([sigmas, sigmas.new_zeros(1)]).float(), timesteps)


def _unipc_grid(steps: int, flow_shift: float) -> Schedule:
    return _whole_timesteps(_NOISIEST_TRAINED_SIGMA, steps, flow_shift)


def _dpm_grid(steps: int, flow_shift: float) -> Schedule:
    return _whole_timesteps(1.0, steps, flow_shift)


_GRIDS: dict[str, Callable[[int, float], Schedule]] = {
    "euler": _even_grid,
    "unipc": _unipc_grid,
    "unipc-bh1": _even_grid,
    "dpm++": _dpm_grid,
}
