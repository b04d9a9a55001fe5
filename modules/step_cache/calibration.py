"""Measure a model for step caches, in a video whose passes are all computed.

Measurements of all passes of a step (positive, negative) and of all sections are averaged: both papers find
them nearly equal, and one list then serves videos with and without guidance. The first step of each expert
has nothing before it: its ratio counts as 1, and it is always computed. Passes that skip layers do not
count. Numbers stay on the device until the end, so nothing waits for them.
"""
# Letters: B batch, L tokens, C width

import functools
import math
import weakref
from collections.abc import Callable, Hashable
from dataclasses import replace

import numpy
import torch
from torch import Tensor, nn

from modules.contract.steps import Turn, Tweaks
from modules.run_blocks import Hidden, Runner
from modules.step_cache.rules import relative_change
from modules.step_cache.runner import Signal, first_input, residual_of

MOST_POWER = 4  # of a fitted polynomial, as the published ones
POINTS_EACH = 3  # measured for each coefficient
FEWEST_STEPS = 1 + 2 * POINTS_EACH  # in which even one pass a step gives a line

# told of each pass: input of the first block's attention, and what the blocks added
Measure = Callable[[Turn, Signal, Tensor], None]


def measure_pass(measure: Measure, inner: Runner, dit: nn.Module, hidden: Hidden, tweaks: Tweaks) -> None:
    """Run the blocks by `inner`, and have the pass measured."""
    before = hidden.x
    inner(dit, hidden, tweaks)
    if tweaks.turn is not None and not tweaks.skip_blocks:
        signal = functools.partial(first_input, dit, Hidden(before, hidden.tokens), tweaks)
        # each expert is measured against itself; weak, so that one may be freed between steps
        turn = replace(tweaks.turn, which=(weakref.ref(dit), tweaks.turn.which))
        measure(turn, signal, residual_of(dit, hidden.x, before))


class Ratios:
    """Changes of the size of the blocks' residual from step to step."""

    def __init__(self) -> None:
        self._sizes: dict[Hashable, tuple[int, Tensor]] = {}  # by pass: step, and B L float32
        self._found: dict[int, list[Tensor]] = {}

    def forget(self) -> None:
        """Forget the last step, and free what was kept of it: the section is done."""
        self._sizes.clear()

    def measure(self, turn: Turn, signal: Signal, residual: Tensor) -> None:
        """Note the mean over all tokens of the ratio of sizes."""
        sizes = residual.norm(dim=-1, dtype=torch.float32)
        step, before = self._sizes.get(turn.which, (None, sizes))
        if step == turn.step - 1:
            ratio = (sizes / before.clamp(min=torch.finfo(torch.float32).tiny)).mean()
            self._found.setdefault(turn.step, []).append(ratio)
        self._sizes[turn.which] = turn.step, sizes

    def result(self, num_steps: int) -> list[float]:
        """Return the mean ratio of each step; the first, and a step that was not measured, has 1."""
        by_step = {step: [float(ratio) for ratio in ratios] for step, ratios in self._found.items()}
        return [
            math.fsum(by_step[step]) / len(by_step[step]) if step in by_step else 1.0
            for step in range(num_steps)
        ]


class Changes:
    """Changes of the first block's input and of the blocks' residual from step to step."""

    def __init__(self) -> None:
        self._before: dict[Hashable, tuple[int, Tensor, Tensor]] = {}
        self._found: list[tuple[Tensor, Tensor]] = []

    def forget(self) -> None:
        """Forget the last step, and free its tensors: the section is done."""
        self._before.clear()

    def measure(self, turn: Turn, signal: Signal, residual: Tensor) -> None:
        """Note the relative changes of both."""
        entered = signal()
        step, before, residual_before = self._before.get(turn.which, (None, entered, residual))
        if step == turn.step - 1:
            self._found.append((relative_change(before, entered), relative_change(residual_before, residual)))
        self._before[turn.which] = turn.step, entered, residual

    @property
    def points(self) -> list[tuple[float, float]]:
        """Return all measurements, as (change of the input, change of the blocks' residual)."""
        return [(float(one), float(other)) for one, other in self._found]

    def result(self) -> list[float]:
        """Return the fitted polynomial's coefficients, highest power first; nothing if points are too few.

        Powers up to 4; fewer if there would be less than three points for each coefficient.
        """
        points = self.points
        power = min(MOST_POWER, len(points) // POINTS_EACH - 1)
        if power < 1:
            return []
        inputs, outputs = zip(*points, strict=True)
        return [float(each) for each in numpy.polyfit(inputs, outputs, power)]
