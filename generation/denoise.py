"""THE denoising loop: a solver follows the velocity that guidance makes of the network's passes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modules.contract.data import Conditions
from modules.contract.family import Passes
from modules.contract.steps import (
    NO_TWEAKS,
    DitAt,
    Guidance,
    Predict,
    Section,
    Step,
    StepDone,
    Turn,
    Tweaks,
    Watcher,
)
from modules.flow.solvers import Solver


@dataclass(frozen=True)
class LoopStart:
    """Where the loop begins."""

    latents: Tensor  # B C F H W, float32
    step: int = 0  # in the solver's schedule; later than 0 for video-to-video


@torch.no_grad()
def denoise(
    family: Passes,
    dit_at: DitAt,
    section: Section,
    start: LoopStart,
    solver: Solver,
    guidance: Guidance,
    watchers: Sequence[Watcher] = (),
    split: bool = True,
) -> Tensor:
    """Follow the velocity from noise to clean latents. Returns B C F H W, float32, where the section's noise
    lies.

    dit_at: timestep -> the network to call. watchers: all are called once the velocity of a step is known; if
    one says "enough", the clean latents as predicted at that step are returned. split: one pass after the
    other instead of equal-shaped conditions as one batch.
    """
    latents = hold_given(section, start.latents.float())
    schedule = solver.schedule
    num_steps = schedule.num_steps - start.step
    for made in range(num_steps):
        index = start.step + made
        step = Step(made, num_steps, float(schedule.sigmas[index]), float(schedule.timesteps[index]), latents)
        velocity = guidance(step, predictor(family, dit_at, step, split, section.tweaks), section).float()
        done = StepDone(step, velocity, section)
        answers = [watch(done) for watch in watchers]  # each is called, whatever those before it say
        if any(answers):
            return done.clean
        latents = hold_given(section, solver.step(index, velocity, latents))
    return latents


def hold_given(section: Section, latents: Tensor) -> Tensor:
    """Return latents B C F H W with the frames that the section is given in their place.

    As their velocity is 0 too, each predicted clean video begins with them, and guidance that measures whole
    velocities does not see them.
    """
    given = section.given
    return latents if given is None else torch.cat([given, latents[:, :, given.shape[2] :]], dim=2)


def predictor(
    family: Passes, dit_at: DitAt, step: Step, split: bool, all_passes: Tweaks = NO_TWEAKS
) -> Predict:
    """Make `predict(*conditions, tweaks=...)` of one step. It returns a velocity B C F H W for each.

    all_passes: tweaks of every pass, to which those of the call are added.
    """
    dit, noisy = dit_at(step.timestep), step.noisy

    def predict(*conditions: Conditions, tweaks: Tweaks = NO_TWEAKS) -> tuple[Tensor, ...]:
        groups = [[one] for one in conditions] if split or not can_stack(conditions) else [list(conditions)]
        velocities: list[Tensor] = []
        for group in groups:
            rows = noisy.repeat(len(group), *([1] * (noisy.ndim - 1)))
            timesteps = torch.full((len(rows),), step.timestep, device=noisy.device)
            # conditions and tweaks are the same objects at all steps of a section
            which = (*map(id, group), id(tweaks))
            turn = Turn(step.index, step.num_steps, step.timestep, which)
            told = replace(tweaks.within(all_passes), turn=turn)
            velocities += family.predict(dit, rows, timesteps, stack(group), told).chunk(len(group))
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
