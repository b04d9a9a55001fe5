"""Skip all blocks of a pass and add their residual from the last computed pass.

    cache = StepCache(lambda: MagCacheRule(...))  # of one section of a video
    with run_around(dit_at, cache.run) as cached_at:
        denoise(family, cached_at, section, ...)

Each pass of a step (positive, negative, with skipped layers) has its own rule and residual, by `pass_key`.
A residual is on the device of the tokens. It is freed before the blocks of its pass run again, and by
`forget`.

MagCache: skip a pass while the size of the residual is known to change little from step to step.
Source: Ma et al. 2025, arXiv 2506.09045. For step c the calibrated ratio is the residual's mean size relative
to that of step c - 1. Over skipped steps the ratios are multiplied; the distance of each product from 1 is an
error, and the errors of a run of skipped steps are summed.

TeaCache: skip a pass while the modulated input of the first block has changed little.
Source: Liu et al. 2024, arXiv 2411.19108. The relative change of the input from step to step, put through a
polynomial fitted for the model, predicts the change of the output. The predictions since the last computed
pass are summed; when the sum reaches the threshold, the pass is computed.

Both are calibrated in a video whose passes are all computed. Measurements of all passes of a step
(positive, negative) and of all sections are averaged: both papers find them nearly equal, and one list then
serves videos with and without guidance. The first step of each expert has no previous step: its ratio is 1,
and it is always computed. Passes that skip layers are not measured. Measurements stay on the device until the
end, so that no step waits for them.
"""

import functools
import math
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, cast

import numpy
import torch
from torch import Tensor, nn

from protocols.steps import DitAt, Overrides, StepPosition
from runtime.offload.block_swap import get_swap
from runtime.offload.sharding import agree_among, gather_block, is_sharded
from runtime.run_blocks import Hidden, Runner, get_runner, get_spec, set_runner

# Letters: B batch, L tokens, C width


FirstBlockInput = Callable[[], Tensor]  # the input of the first block's attention, B L C


class Rule(Protocol):
    """Rule that decides at each step whether a network pass is skipped; it keeps state between steps."""

    def should_skip(self, step_position: StepPosition, first_block_input: FirstBlockInput) -> bool:
        """Return whether to skip the pass. Called once at every step that has this pass.

        The first answer is no, because there is no residual to add yet.
        """
        ...


@dataclass(eq=False)
class PassState:
    """The state of one pass of a step: the rule that may skip it, and what its last run added to `x`."""

    rule: Rule
    residual: Tensor | None = None  # B L C


@dataclass(eq=False)
class StepCache:
    """Skips passes in one section of a video if their blocks would add nearly the same as last time."""

    make_rule: Callable[[], Rule]
    passes: int = 0
    skipped: int = 0

    def __post_init__(self) -> None:
        # by network, as each expert has its own residuals; weak, so that one may be freed between steps
        self._states = weakref.WeakKeyDictionary[nn.Module, dict[Hashable, PassState]]()

    def run(self, inner: Runner, dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
        """Run the blocks with `inner`, or add to `hidden.x` what their last run added (the residual)."""
        step_position = overrides.step_position  # step and pass of this call; None: nothing is cached
        if step_position is None:
            inner(dit, hidden, overrides)
            return
        states = self._states.setdefault(dit, {})
        if step_position.pass_key not in states:
            states[step_position.pass_key] = PassState(self.make_rule())
        state = states[step_position.pass_key]
        self.passes += 1
        should_skip = state.rule.should_skip(
            step_position, functools.partial(compute_first_block_input, dit, hidden, overrides)
        )
        # all processes must make the same decision, but their signals may differ in the last digit
        if agree_among(dit, should_skip):
            assert state.residual is not None
            self.skipped += 1
            hidden.x = hidden.x + state.residual
            return
        state.residual = None  # frees memory for the input, which is kept while the blocks run
        before = hidden.x
        inner(dit, hidden, overrides)
        state.residual = compute_residual(dit, hidden.x, before)

    def forget(self) -> None:
        """Drop the residuals, so that the next pass is computed."""
        self._states.clear()


def compute_residual(dit: nn.Module, after: Tensor, before: Tensor) -> Tensor:
    """Return the blocks' residual, B L C.

    It is kept in bfloat16 if the network computes in bfloat16, even if the residual stream is float32 (Wan):
    this halves the memory, and the rounding error of 0.2 % is far below the change between steps.
    """
    computes_in = getattr(dit, "compute_dtype", None)
    return (after - before).to(torch.bfloat16 if computes_in == torch.bfloat16 else after.dtype)


def compute_first_block_input(dit: nn.Module, hidden: Hidden, overrides: Overrides) -> Tensor:
    """Return the modulated input of the first block's attention, B L C, without running the block.

    If the block is swapped, its weights are copied to the device. Usually they are already there, because
    the previous pass prefetched them, and they stay for the next pass. A block that is split over processes
    is gathered in the same way.
    """
    spec = get_spec(dit)
    assert spec.modulated_input is not None
    swap = get_swap(dit)
    if swap is not None:
        swap.fetch(0, overrides.skip_blocks)
    first_block = next(iter(spec.blocks(dit)[spec.block_lists[0]]))
    if is_sharded(dit):
        gather_block(first_block)
    # `spec.modulated_input` is the name of the block's method that computes it
    modulated: Tensor = getattr(first_block, spec.modulated_input)(hidden.x, hidden.tokens)
    return modulated


@contextmanager
def run_around(dit_at: DitAt, run: Callable[[Runner, nn.Module, Hidden, Overrides], None]) -> Iterator[DitAt]:
    """Yield `dit_at` with `run` wrapped around the block runner of each network.

    At the end, also after an exception, every network has its own runner again.

    Args:
        dit_at: Returns the network to call at a timestep.
        run: Runs the blocks; its first argument is the network's own runner.
    """
    # networks only, not their runners: a runner that fetches swapped weights would keep a freed network's
    # weights alive
    wrapped = weakref.WeakSet[nn.Module]()

    def wrapped_dit_at(timestep: float) -> nn.Module:
        dit = dit_at(timestep)
        if dit not in wrapped:
            set_runner(dit, functools.partial(run, get_runner(dit)))
            wrapped.add(dit)
        return dit

    try:
        yield wrapped_dit_at
    finally:
        for dit in wrapped:
            wrapper = cast("functools.partial[None]", get_runner(dit))
            # the network's own runner is the last bound argument: if `run` is a partial itself, its arguments
            # come first
            set_runner(dit, wrapper.args[-1])


class MagCacheRule:
    """Decide by MagCache's measured ratios, without reading tensors, which steps skip a pass."""

    def __init__(self, ratios: Sequence[float], retention: float, threshold: float, max_skips: int) -> None:
        """Start without skipped passes.

        Args:
            ratios: One ratio for each step of the video.
            retention: Fraction of the steps, at the start, in which no pass is skipped.
            threshold: Maximum sum of errors over consecutive skipped passes.
            max_skips: Maximum number of consecutive skipped passes.
        """
        self._ratios, self._retention = ratios, retention
        self._threshold, self._max_skips = threshold, max_skips
        self._last_step: int | None = None  # step of the last call
        self._reset()

    def should_skip(self, step_position: StepPosition, first_block_input: FirstBlockInput) -> bool:
        """Return whether the error accumulated since the last computed pass allows another skip.

        The first steps (the fraction `retention`, at least one) and the last step are never skipped.
        `first_block_input`, which other rules compare, is not needed.
        """
        last_step = self._last_step
        self._last_step = step_position.step
        first_skippable = max(int(self._retention * step_position.num_steps), 1)
        may_skip = first_skippable <= step_position.step < step_position.num_steps - 1
        if last_step is None or not may_skip:
            self._reset()
            return False
        # the product of the ratios is the predicted change in size of the residual; 1 means no error. There
        # are several ratios to multiply if some steps did not have this pass
        for step in range(last_step + 1, step_position.step + 1):
            self._ratio *= self._ratios[step]
            self._error += abs(1 - self._ratio)
            self._skipped += 1
        if self._error <= self._threshold and self._skipped <= self._max_skips:
            return True
        self._reset()
        return False

    def _reset(self) -> None:
        self._ratio, self._error, self._skipped = 1.0, 0.0, 0


def resample(ratios: Sequence[float], count: int) -> list[float]:
    """Return `count` ratios sampled at evenly spaced positions, both ends included, without interpolation."""
    if count == 1:
        return [ratios[-1]]
    return [ratios[round(index * (len(ratios) - 1) / (count - 1))] for index in range(count)]


class TeaCacheRule:
    """Decide by TeaCache's accumulated change which steps skip a pass; the host waits once per step."""

    def __init__(self, threshold: float, coefficients: tuple[float, ...]) -> None:
        """Start without skipped passes.

        Args:
            threshold: Accumulated change at which a pass is computed again.
            coefficients: Coefficients of the polynomial, highest power first.
        """
        self._threshold, self._coefficients = threshold, coefficients
        self._accumulated_change = 0.0
        self._previous_input: Tensor | None = None

    def should_skip(self, step_position: StepPosition, first_block_input: FirstBlockInput) -> bool:
        """Return whether the changes since the last computed pass add up to less than the threshold.

        `first_block_input` computes what is compared: the input of the first block's attention.
        """
        if step_position.step == step_position.num_steps - 1:  # always computed; the next run starts anew
            self._previous_input = None
            return False
        previous_input = self._previous_input
        self._previous_input = first_block_input()
        if previous_input is None or step_position.step == 0:
            self._accumulated_change = 0.0
            return False
        change = polynomial(self._coefficients, float(relative_change(previous_input, self._previous_input)))
        self._accumulated_change += max(change, 0.0)  # a fitted polynomial may dip below zero
        if self._accumulated_change < self._threshold:
            return True
        self._accumulated_change = 0.0
        return False


def relative_change(before: Tensor, now: Tensor) -> Tensor:
    """Return the mean absolute difference of two tensors, divided by the mean absolute value of the first.

    The result is a float32 scalar on their device, so that no copy to the host is needed.
    """
    size = before.abs().mean(dtype=torch.float32)
    return (now - before).abs_().mean(dtype=torch.float32) / size


def polynomial(coefficients: tuple[float, ...], x: float) -> float:
    """Evaluate a polynomial, whose coefficient of the highest power comes first."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


# Letters: B batch, L tokens, C width


MAX_POWER = 4  # degree of a fitted polynomial, as in the published ones
POINTS_EACH = 3  # required measurements per coefficient
MIN_STEPS = 1 + 2 * POINTS_EACH  # enough for a straight line with one pass a step

# called for each pass with the input of the first block's attention and what the blocks added
Measure = Callable[[StepPosition, FirstBlockInput, Tensor], None]


def measure_pass(
    measure: Measure, inner: Runner, dit: nn.Module, hidden: Hidden, overrides: Overrides
) -> None:
    """Run all blocks, and pass their input and their residual to `measure`.

    Passes outside the steps of a video, and passes that skip blocks, are not measured.
    """
    before = hidden.x
    inner(dit, hidden, overrides)
    if overrides.step_position is not None and not overrides.is_perturbed:
        first_block_input = functools.partial(
            compute_first_block_input, dit, Hidden(before, hidden.tokens), overrides
        )
        # each expert is measured against itself; weak, so that one may be freed between steps
        step_position = replace(
            overrides.step_position, pass_key=(weakref.ref(dit), overrides.step_position.pass_key)
        )
        measure(step_position, first_block_input, compute_residual(dit, hidden.x, before))


class Ratios:
    """Measured ratios of the size of the blocks' residual from step to step."""

    def __init__(self) -> None:
        self._sizes: dict[Hashable, tuple[int, Tensor]] = {}  # by pass: step, and B L float32
        self._found: dict[int, list[Tensor]] = {}

    def forget(self) -> None:
        """Drop the residual sizes of earlier steps."""
        self._sizes.clear()

    def measure(
        self, step_position: StepPosition, first_block_input: FirstBlockInput, residual: Tensor
    ) -> None:
        """Record the ratio of the residual's size to that at the previous step, averaged over all tokens."""
        sizes = residual.norm(dim=-1, dtype=torch.float32)
        step, before = self._sizes.get(step_position.pass_key, (None, sizes))
        if step == step_position.step - 1:
            ratio = (sizes / before.clamp(min=torch.finfo(torch.float32).tiny)).mean()
            self._found.setdefault(step_position.step, []).append(ratio)
        self._sizes[step_position.pass_key] = step_position.step, sizes

    def result(self, num_steps: int) -> list[float]:
        """Return each step's mean residual size ratio; 1 for steps without one, such as the first step."""
        by_step = {step: [float(ratio) for ratio in ratios] for step, ratios in self._found.items()}
        return [
            math.fsum(by_step[step]) / len(by_step[step]) if step in by_step else 1.0
            for step in range(num_steps)
        ]


class Changes:
    """Measured changes of the first block's input and of the blocks' residual from step to step."""

    def __init__(self) -> None:
        self._before: dict[Hashable, tuple[int, Tensor, Tensor]] = {}
        self._found: list[tuple[Tensor, Tensor]] = []

    def forget(self) -> None:
        """Forget the tensors of earlier steps."""
        self._before.clear()

    def measure(
        self, step_position: StepPosition, first_block_input: FirstBlockInput, residual: Tensor
    ) -> None:
        """Record the relative changes since the previous step of the same pass; nothing at the first step."""
        entered = first_block_input()
        step, before, residual_before = self._before.get(step_position.pass_key, (None, entered, residual))
        if step == step_position.step - 1:
            self._found.append((relative_change(before, entered), relative_change(residual_before, residual)))
        self._before[step_position.pass_key] = step_position.step, entered, residual

    @property
    def points(self) -> list[tuple[float, float]]:
        """Return all measurements as pairs: change of the input, change of the blocks' residual."""
        return [(float(change), float(residual)) for change, residual in self._found]

    def result(self) -> list[float]:
        """Return the coefficients of the fitted polynomial, highest power first; empty with too few points.

        The highest power is 4, or less if there would be fewer than three points per coefficient.
        """
        points = self.points
        power = min(MAX_POWER, len(points) // POINTS_EACH - 1)
        if power < 1:
            return []
        inputs, outputs = zip(*points, strict=True)
        return [float(coefficient) for coefficient in numpy.polyfit(inputs, outputs, power)]
