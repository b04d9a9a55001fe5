"""TeaCache: skip a pass while the modulated input of the first block has changed little.

Source: Liu et al. 2024, arXiv 2411.19108. The relative change of the input from step to step, put into a
polynomial fitted for the model, predicts the change of the output. The predictions since the last computed
pass are summed; at the threshold the next one is computed.
"""

import torch
from torch import Tensor

from modules.contract.generation import Turn
from modules.step_cache.runner import Signal


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
