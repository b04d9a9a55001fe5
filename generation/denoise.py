"""THE denoising loop: what guidance makes of the network's passes is followed by a solver."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blissful_tuner.guidance import Guidance
from modules.contract.data import Conditions
from modules.contract.family import Predicts
from modules.contract.generation import NO_TWEAKS, DitAt, Predict, Section, Tweaks
from modules.flow.solvers import Solver


@dataclass(frozen=True)
class Start:
    """Where the loop begins."""

    latents: Tensor  # B C F H W, float32
    step: int = 0  # in the solver's schedule; later than 0 for video-to-video


@dataclass(frozen=True)
class StepDone:
    """What a watcher of the loop is told after each step; raising in it ends the loop."""

    step: int  # from 0, of those that are made
    num_steps: int
    sigma: float  # noise level before the step
    noisy: Tensor  # latents before the step
    velocity: Tensor
    section: Section

    @property
    def clean(self) -> Tensor:
        """The clean latents as predicted at this step, B C F H W."""
        return self.noisy - self.sigma * self.velocity


OnStep = Callable[[StepDone], None]


@torch.no_grad()
def denoise(
    family: Predicts,
    dit_at: DitAt,
    section: Section,
    start: Start,
    solver: Solver,
    guidance: Guidance,
    on_step: OnStep | None = None,
    split: bool = True,
) -> Tensor:
    """Follow the velocity from noise to clean latents. Returns B C F H W, float32, where the section's noise
    lies.

    dit_at: timestep -> the network to call. split: one pass after the other instead of equal-shaped
    conditions as one batch.
    """
    latents = start.latents.float()
    schedule = solver.schedule
    num_steps = schedule.num_steps - start.step
    for step in range(num_steps):
        index = start.step + step
        timestep = float(schedule.timesteps[index])
        predict = predictor(family, dit_at, latents, timestep, split)
        velocity = guidance(step, predict, section).float()
        noisy, latents = latents, solver.step(index, velocity, latents)
        if on_step is not None:
            on_step(StepDone(step, num_steps, float(schedule.sigmas[index]), noisy, velocity, section))
    return latents


def predictor(family: Predicts, dit_at: DitAt, noisy: Tensor, timestep: float, split: bool) -> Predict:
    """`predict(*conditions, tweaks=...)` at one timestep: a velocity B C F H W for each of the conditions."""
    dit = dit_at(timestep)

    def predict(*conditions: Conditions, tweaks: Tweaks = NO_TWEAKS) -> tuple[Tensor, ...]:
        groups = [[one] for one in conditions] if split or not can_stack(conditions) else [list(conditions)]
        velocities: list[Tensor] = []
        for group in groups:
            rows = noisy.repeat(len(group), *([1] * (noisy.ndim - 1)))
            timesteps = torch.full((len(rows),), timestep, device=noisy.device)
            velocities += family.predict(dit, rows, timesteps, stack(group), tweaks).chunk(len(group))
        return tuple(velocities)

    return predict


def can_stack(conditions: Sequence[Conditions]) -> bool:
    """Whether the conditions have the same names and their tensors the same shapes; lists may differ in
    length per sample.
    """

    def outline(one: Conditions) -> dict[str, tuple[int, ...] | None]:
        return {
            name: None if isinstance(value, list) else tuple(value.shape[1:]) for name, value in one.items()
        }

    return all(outline(one) == outline(conditions[0]) for one in conditions)


def stack(conditions: Sequence[Conditions]) -> Conditions:
    """Conditions of several passes as one batch."""
    if len(conditions) == 1:
        return conditions[0]
    stacked: dict[str, Tensor | list[Tensor]] = {}
    for name in conditions[0]:
        values = [one[name] for one in conditions]
        tensors = [value for value in values if isinstance(value, Tensor)]
        stacked[name] = torch.cat(tensors) if tensors else [item for value in values for item in value]
    return stacked
