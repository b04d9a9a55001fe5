"""Differential equation solvers that follow a predicted velocity from noise to data. All in float32.

A solver belongs to one run over one schedule and may remember earlier predictions. Letters as in the papers:
sigma and alpha are the shares of noise and data, lambda = log(alpha / sigma), h a step in lambda, x0 a
predicted clean sample. A step is exact if x0 stays the same; higher orders model x0 as a polynomial in
lambda.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from modules.flow.schedule import Schedule, make_schedule, shift_sigmas

Draw = Callable[[Sequence[int]], Tensor]  # shape -> standard normal numbers, float32


class Solver(Protocol):
    """Takes denoising steps in order of their index; the first index may be above 0 (video-to-video)."""

    @property
    def schedule(self) -> Schedule:
        """Noise levels and timesteps of all steps."""

    def step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """Return the sample at the next noise level.

        `velocity` and `sample` belong to `schedule.sigmas[index]`. Both are float32, as is the result.
        """
        ...


def solver_for(
    name: str,
    steps: int,
    flow_shift: float,
    table: Sequence[float] = (),
    draw: Draw | None = None,
    levels: Sequence[float] = (),
    audio_shift: float = 1.0,
) -> Solver:
    """Make a new solver with its schedule.

    Args:
        name: "euler" (also "euler-trained", "euler-terminal", "euler-tenth", "euler-thousandth"), "unipc",
            "unipc-bh1", "dpm++", or one that adds noise: "dpm++sde", "lcm".
        steps: Number of steps.
        flow_shift: Shift of the noise levels.
        table: Sigma of each training timestep, which replaces the shifted schedule; empty: the schedule is
            computed.
        draw: Draws noise; called only in steps that add noise.
        levels: `steps` decreasing noise levels followed by 0, which replace the solver's own; empty: its own.
        audio_shift: Shift of the noise levels for audio; only Euler can follow two schedules.

    Raises:
        ValueError: If the name is unknown, or if a solver that adds noise gets no `draw`.
    """
    schedule = make_schedule(name, steps, flow_shift, table=table, levels=levels)
    if audio_shift != 1:
        if _SOLVERS.get(name) is not Euler:
            raise ValueError(
                f"the solver {name!r} supports only one schedule: audio with its own needs Euler"
            )
        schedule = replace(schedule, audio_sigmas=shift_sigmas(schedule.sigmas, audio_shift))
    if name not in _STOCHASTIC_SOLVERS:
        return _SOLVERS[name](schedule)
    if draw is None:
        raise ValueError(f"the solver {name!r} adds noise: say where to draw it from")
    return _STOCHASTIC_SOLVERS[name](schedule, draw)


@dataclass(frozen=True)
class Euler:
    """Euler's method: straight steps along the velocity."""

    schedule: Schedule

    def step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """Move the sample along the velocity to the next noise level."""
        sigma = self.schedule.sigmas[index]
        sigma_next = self.schedule.sigmas[index + 1]
        return sample.float() + float(sigma_next - sigma) * velocity.float()


@dataclass(frozen=True)
class Lcm:
    """Jump to the predicted clean sample, then add fresh noise: for models distilled to a few steps.

    Source: Song et al. 2023, arXiv 2303.01469, algorithm 1, applied to a rectified flow.
    """

    schedule: Schedule
    draw: Draw

    def step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """Predict the clean sample and add fresh noise at the next noise level; the last step adds none."""
        current = _Level.read(self.schedule, index)
        following = _Level.read(self.schedule, index + 1)
        x0 = sample.float() - current.sigma * velocity.float()
        return following.alpha * x0 + following.sigma * self.draw(sample.shape) if following.sigma > 0 else x0


@dataclass
class DpmPlusPlus:
    """DPM-Solver++ 2M in its midpoint form; the first and the last step are first-order.

    With `draw`, which returns noise, each step replaces part of the noise: the stochastic variant
    SDE-DPM-Solver++(2M) of the same paper. Source: Lu et al. 2022, arXiv 2211.01095, algorithm 2.
    """

    schedule: Schedule
    draw: Draw | None = None  # None: the path is deterministic
    _history: list["_Prediction"] = field(default_factory=list)

    def step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """Extrapolate the clean sample from this prediction and the last one, and move to the next level."""
        current = _Level.read(self.schedule, index)
        following = _Level.read(self.schedule, index + 1)
        prediction = _Prediction(current, sample.float() - current.sigma * velocity.float())
        x0 = prediction.x0
        if self._history and following.sigma > 0:  # the step to sigma 0 is infinitely long
            previous = self._history[-1]
            # length of the last step relative to this step: infinite after pure noise
            last_step = current.log_ratio - previous.level.log_ratio
            ratio = last_step / (following.log_ratio - current.log_ratio)
            x0 = x0 + (0.5 / ratio) * (x0 - previous.x0)
        self._history = [prediction]
        if self.draw is None:
            return _move(current, following, sample.float(), x0)
        return _move_with_noise(current, following, sample.float(), x0, draw=self.draw)


@dataclass(frozen=True)
class UniPCVariant:
    """The details in which the released implementations of UniPC differ.

    B(h) cancels out of all weights that are solved for: only a single weight depends on it.
    """

    order: int  # maximum order; lower at the start, and 1 for the step to sigma 0
    has_unit_alpha: bool  # use alpha = 1 at every sigma, regardless of the schedule
    # h -> weight of a single difference: B(h) / 2 in units of 1 - e^-h
    single_weight: Callable[[float], float]


BH2 = UniPCVariant(order=2, has_unit_alpha=False, single_weight=lambda step: 0.5)  # Wan's: B(h) = 1 - e^-h
# FramePack's: B(h) = h, and alpha is 1, so lambda = -log(sigma), as if noise were added without weakening
# the data
BH1 = UniPCVariant(order=3, has_unit_alpha=True, single_weight=lambda step: 0.5 * step / -math.expm1(-step))


@dataclass
class UniPC:
    """UniPC on clean-sample predictions.

    Each call first corrects the sample that the previous call predicted, using the velocity at that sample,
    and then predicts the next sample. Source: Zhao et al. 2023, arXiv 2302.04867.
    """

    schedule: Schedule
    variant: UniPCVariant = BH2
    corrected: Tensor | None = None  # corrected sample from which the last step started
    _last_order: int = 0  # order of the last step
    _history: list["_Prediction"] = field(default_factory=list)  # the last predictions, oldest first

    def step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """Correct the sample with the velocity at this level, then predict the sample of the next level."""
        current = _Level.read(self.schedule, index, self.variant.has_unit_alpha)
        following = _Level.read(self.schedule, index + 1, self.variant.has_unit_alpha)
        prediction = _Prediction(current, sample.float() - current.sigma * velocity.float())
        if self.corrected is None:
            self.corrected = sample.float()
        else:
            previous = self._history[-1]
            change = self._weigh_differences(current, prediction)
            self.corrected = _move(previous.level, current, self.corrected, previous.x0, change=change)
        self._history = [*self._history, prediction][-self.variant.order :]
        self._last_order = len(self._history) if following.sigma > 0 else 1
        change = self._weigh_differences(following)
        return _move(current, following, self.corrected, prediction.x0, change=change)

    def _weigh_differences(self, end: "_Level", at_end: "_Prediction | None" = None) -> Tensor | float:
        """Return how much the clean sample changes over the step from the last prediction's level to `end`.

        It is a weighted sum of differences between other predictions and the last one. `at_end` is the
        prediction at `end`, if it is known. Predictions at pure noise are left out: they are infinitely far
        away in log(alpha / sigma).
        """
        *older, last = self._history[-self._last_order :]
        step = end.log_ratio - last.level.log_ratio
        distances: list[float] = []  # from the last prediction, in units of this step
        differences: list[Tensor] = []
        for prediction in reversed(older):
            distance = (prediction.level.log_ratio - last.level.log_ratio) / step
            if math.isfinite(distance):
                distances.append(distance)
                differences.append(prediction.x0 - last.x0)
        if at_end is not None:
            distances.append(1.0)
            differences.append(at_end.x0 - last.x0)
        if len(distances) == 1:  # as in the released code: 1/2, the limit of the exact weight for small steps
            weights = [self.variant.single_weight(step)]
        else:
            weights = _solve_weights(step, distances)
        change: Tensor | float = 0.0
        for weight, distance, difference in zip(weights, distances, differences, strict=True):
            change = change + weight / distance * difference
        return change


@dataclass(frozen=True)
class _Level:
    """A noise level: the weights sigma of noise and alpha of data, and log(alpha / sigma)."""

    sigma: float
    alpha: float
    log_ratio: float

    @classmethod
    def read(cls, schedule: Schedule, index: int, has_unit_alpha: bool = False) -> "_Level":
        sigma = float(schedule.sigmas[index])
        alpha = 1.0 if has_unit_alpha else float(schedule.alphas[index])
        if sigma <= 0:
            return cls(sigma, alpha, math.inf)
        if alpha <= 0:
            return cls(sigma, alpha, -math.inf)
        return cls(sigma, alpha, math.log(alpha / sigma))


@dataclass(frozen=True)
class _Prediction:
    """A step's prediction by the network: the noise level, and the predicted clean sample x0."""

    level: _Level
    x0: Tensor


def _solve_weights(step: float, distances: list[float]) -> list[float]:
    """Solve the linear system of UniPC's equation 9 in float64; return a weight for each distance."""
    # h phi_2(h) of the paper; each further row needs the next phi, which follows from the previous one
    phi = math.expm1(-step) / -step - 1
    factorial = 1.0
    matrix = []
    right_side = []
    for power in range(len(distances)):
        matrix.append([distance**power for distance in distances])
        right_side.append(phi * factorial / math.expm1(-step))
        factorial *= power + 2
        phi = phi / -step - 1 / factorial
    if not matrix:
        return []
    solution: list[float] = torch.linalg.solve(
        torch.tensor(matrix, dtype=torch.float64), torch.tensor(right_side, dtype=torch.float64)
    ).tolist()
    return solution


def _move(
    current: _Level, following: _Level, sample: Tensor, x0: Tensor, change: Tensor | float = 0.0
) -> Tensor:
    """Return the sample at the next level, exact if x0 is constant; `change` corrects for a changing x0."""
    step = following.log_ratio - current.log_ratio
    return (following.sigma / current.sigma) * sample - following.alpha * math.expm1(-step) * (x0 + change)


def _move_with_noise(current: _Level, following: _Level, sample: Tensor, x0: Tensor, draw: Draw) -> Tensor:
    """Return the sample after a step twice as long in lambda as usual, with fresh noise to compensate."""
    # A step from pure noise replaces all noise; a step to sigma 0 adds none.
    factor = math.exp(current.log_ratio - following.log_ratio)
    moved = (following.sigma / current.sigma) * factor * sample + following.alpha * (1 - factor**2) * x0
    if following.sigma <= 0:
        return moved
    return moved + following.sigma * math.sqrt(1 - factor**2) * draw(sample.shape)


_SOLVERS: dict[str, Callable[[Schedule], Solver]] = {
    "euler": Euler,
    "euler-trained": Euler,
    "euler-terminal": Euler,
    "euler-tenth": Euler,
    "euler-thousandth": Euler,
    "unipc": UniPC,
    "unipc-bh1": partial(UniPC, variant=BH1),
    "dpm++": DpmPlusPlus,
}
_STOCHASTIC_SOLVERS: dict[str, Callable[[Schedule, Draw], Solver]] = {"dpm++sde": DpmPlusPlus, "lcm": Lcm}
