"""Decide which passes of a step are skipped, by MagCache or by TeaCache.

MagCache: skip a pass while the size of the residual is known to change little from step to step.
Source: Ma et al. 2025, arXiv 2506.09045. For step c the calibrated ratio is the residual's mean size against
that of step c - 1. Over skipped steps the ratios are multiplied; the distance of each product from 1 is an
error, and the errors of a run of skipped steps are summed.

TeaCache: skip a pass while the modulated input of the first block has changed little.
Source: Liu et al. 2024, arXiv 2411.19108. The relative change of the input from step to step, put into a
polynomial fitted for the model, predicts the change of the output. The predictions since the last computed
pass are summed; at the threshold the next one is computed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.contract.steps import Turn
from modules.step_cache.runner import Signal


class MagCacheRule:
    """Decides for one pass of each step; looks at no tensor."""

    def __init__(self, ratios: Sequence[float], retention: float, threshold: float, most_skips: int) -> None:
        """ratios: one for each step that is made. The others: see `modules.contract.rules.MagCache`."""
        self._ratios, self._retention = ratios, retention
        self._threshold, self._most_skips = threshold, most_skips
        self._last: int | None = None  # step of the last call
        self._forget()

    def skips(self, turn: Turn, signal: Signal) -> bool:
        """Return whether the error summed since the last computed pass allows another skip."""
        last, self._last = self._last, turn.step
        first = max(int(self._retention * turn.num_steps), 1)
        if last is None or not first <= turn.step < turn.num_steps - 1:
            self._forget()
            return False
        for step in range(last + 1, turn.step + 1):  # several if steps lacked this pass: it has aged by all
            self._ratio *= self._ratios[step]
            self._error += abs(1 - self._ratio)
            self._skipped += 1
        if self._error <= self._threshold and self._skipped <= self._most_skips:
            return True
        self._forget()
        return False

    def _forget(self) -> None:
        self._ratio, self._error, self._skipped = 1.0, 0.0, 0


def resample(ratios: Sequence[float], count: int) -> list[float]:
    """Return `count` of the ratios: those at the nearest of as many equal distances, both ends included."""
    if count == 1:
        return [ratios[-1]]
    return [ratios[round(index * (len(ratios) - 1) / (count - 1))] for index in range(count)]


class TeaCacheRule:
    """Decides for one pass of each step. The host waits for one number of each."""

    def __init__(self, threshold: float, coefficients: tuple[float, ...]) -> None:
        """coefficients: of the polynomial, highest power first."""
        self._threshold, self._coefficients = threshold, coefficients
        self._distance = 0.0
        self._before: Tensor | None = None

    def skips(self, turn: Turn, signal: Signal) -> bool:
        """Return whether the change since the last computed pass is below the threshold."""
        if turn.step == turn.num_steps - 1:  # the last step is computed
            self._before = None
            return False
        before, self._before = self._before, signal()
        if before is None or turn.step == 0:
            self._distance = 0.0
            return False
        change = polynomial(self._coefficients, float(relative_change(before, self._before)))
        self._distance += max(change, 0.0)  # a fitted polynomial may dip below zero
        if self._distance < self._threshold:
            return True
        self._distance = 0.0
        return False


def relative_change(before: Tensor, now: Tensor) -> Tensor:
    """Return the mean absolute difference of two tensors of one shape, as a share of the mean size of the
    first: a number on their device, float32.
    """
    size = before.abs().mean(dtype=torch.float32)
    return (now - before).abs_().mean(dtype=torch.float32) / size


def polynomial(coefficients: tuple[float, ...], x: float) -> float:
    """Return the value at x of the polynomial. coefficients: highest power first."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value
