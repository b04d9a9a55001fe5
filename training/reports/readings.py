"""Read the numbers that a step leaves on the device one step later, so that the host never waits for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Notes:
    """Hold what the host knows of a step at once."""

    keys: tuple[str, ...]  # the items this process trained on
    rates: Mapping[str, float]  # learning rates by group


@dataclass(frozen=True)
class Reading:
    """Hold what is known of a step after the next one was begun."""

    step: int
    values: tuple[float, ...]
    notes: Notes


@dataclass
class Readings:
    """Hold the numbers of one step."""

    _waiting: tuple[int, Tensor, Any, Notes] | None = field(default=None, init=False)

    def push(self, step: int, numbers: Tensor, notes: Notes) -> Reading | None:
        """Take the numbers (1-D, on any device) of `step`; returns the reading of the step before."""
        before = self.flush() if self._waiting is not None else None
        arrived = None
        if numbers.is_cuda:
            host = torch.empty_like(numbers, device="cpu", pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._waiting = (step, numbers, arrived, notes)
        return before

    def flush(self) -> Reading | None:
        """Return the reading that is still waiting, if any; the host waits for the device."""
        if self._waiting is None:
            return None
        (step, numbers, arrived, notes), self._waiting = self._waiting, None
        if arrived is not None:
            arrived.synchronize()
        return Reading(step, tuple(numbers.tolist()), notes)
