"""Read the numbers that a step leaves on the device one step later, so that the host never waits for them.

A step is timed from the end of the step before it, or from the end of a pause, to its own end on the device:
not to when the host reads its numbers, which is a step later, or at once if a pause follows.
"""

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modules.devices import empty_pinned


@dataclass(frozen=True)
class Notes:
    """Hold what the host knows of a step at once."""

    keys: tuple[str, ...]  # the items this process trained on
    rates: Mapping[str, float]  # learning rates by group
    sizes: Hashable = None  # of the items: steps that share them take as long


@dataclass(frozen=True)
class Reading:
    """Hold what is known of a step after the next one was begun."""

    step: int
    values: tuple[float, ...]
    notes: Notes
    seconds: float | None = None  # that the step took; None: the clock was not started


@dataclass(frozen=True)
class Moment:
    """Hold a time: of the host, or an event of a CUDA device, which may still lie ahead."""

    host: float = 0.0
    event: Any = None

    def seconds_to(self, later: "Moment") -> float:
        """Return the seconds between two moments of the same device that have both passed."""
        if self.event is not None and later.event is not None:
            return self.event.elapsed_time(later.event) / 1000
        return later.host - self.host


@dataclass
class Readings:
    """Hold the numbers of one step. `now` returns seconds."""

    now: Callable[[], float] = time.monotonic
    _waiting: tuple[int, Tensor, Moment | None, Notes] | None = field(default=None, init=False)
    _last: Moment | None = field(default=None, init=False)  # end of the last step or pause

    def restart_clock(self, device: torch.device) -> None:
        """Exclude the time until now (samples, saving, validation) from the next step."""
        self._last = Moment(self.now(), _record_event() if device.type == "cuda" else None)

    def push(self, step: int, numbers: Tensor, notes: Notes) -> Reading | None:
        """Take the numbers (1-D, on any device) of `step`; returns the reading of the step before."""
        ended: Moment | None = None  # on other devices: known when the numbers have arrived
        if numbers.is_cuda:
            host = empty_pinned(numbers.shape, numbers.dtype)
            numbers = host.copy_(numbers, non_blocking=True)
            ended = Moment(self.now(), _record_event())
        elif numbers.device.type == "cpu":
            ended = Moment(self.now())
        before = self.flush() if self._waiting is not None else None
        self._waiting = (step, numbers, ended, notes)
        return before

    def flush(self) -> Reading | None:
        """Return the reading that is still waiting, if any; the host waits for the device."""
        if self._waiting is None:
            return None
        (step, numbers, ended, notes), self._waiting = self._waiting, None
        if ended is not None and ended.event is not None:
            ended.event.synchronize()
        values = tuple(numbers.tolist())
        if ended is None:
            ended = Moment(self.now())
        seconds = None if self._last is None else self._last.seconds_to(ended)
        self._last = ended
        return Reading(step, values, notes, seconds)


def _record_event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
