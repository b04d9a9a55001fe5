"""Read the numbers that a step leaves on the device one step later, so that the host never waits for them.

They are one row: the loss; if there are several experts the sum of the losses and the count of micro-batches
of each; of several processes their wishes; at the end norms.

A step is timed from the end of the step before it, or from the end of a pause, to its own end on the device:
not to when the host reads its numbers, which is a step later, or at once if a pause follows.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modules.contract.rules import Expert
from modules.devices import empty_pinned


class StepSums:
    """The loss of a step, and of each expert its losses and its micro-batches, summed on the device."""

    def __init__(self, experts: Sequence[Expert], device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self._parts = torch.zeros(2, len(named(experts)), device=device)

    def add(self, loss: Tensor, expert: int, micro_batches: int) -> None:
        """Add a micro-batch. loss: divided by the number of the step's micro-batches."""
        self.loss += loss
        if self._parts.numel():
            self._parts[0, expert] += loss * micro_batches
            self._parts[1, expert] += 1

    def row(self) -> Tensor:
        """Return the numbers as the beginning of the row."""
        return torch.cat([self.loss.view(1), self._parts.view(-1)])


def named(experts: Sequence[Expert]) -> Sequence[Expert]:
    """Return the experts whose losses are reported apart: none if there is one."""
    return experts if len(experts) > 1 else ()


def places_of_wishes(experts: Sequence[Expert]) -> range:
    """Return where stands whether a process asks to end, to save, and for samples."""
    first = 1 + 2 * len(named(experts))
    return range(first, first + 3)


def losses_by_expert(values: Sequence[float], experts: Sequence[Expert]) -> dict[str, float]:
    """Return the mean loss of a step's micro-batches for each expert that had some, by the expert's name."""
    experts = named(experts)
    sums, counts = (values[1 + part * len(experts) :][: len(experts)] for part in range(2))
    return {
        expert.name: total / count
        for expert, total, count in zip(experts, sums, counts, strict=True)
        if count
    }


@dataclass(frozen=True)
class Reading:
    """Hold what the host knows of a step at once, and its numbers when the next one has begun."""

    step: int
    keys: tuple[str, ...]  # the items this process trained on
    rates: Mapping[str, float]  # learning rates by group
    sizes: Hashable = None  # of the items: steps that share them take as long
    values: tuple[float, ...] = ()
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
    _waiting: tuple[Reading, Tensor, Moment | None] | None = field(default=None, init=False)
    _last: Moment | None = field(default=None, init=False)  # end of the last step or pause

    def restart_clock(self, device: torch.device) -> None:
        """Exclude the time until now (samples, saving, validation) from the next step."""
        self._last = Moment(self.now(), _record_event() if device.type == "cuda" else None)

    def push(self, step: Reading, numbers: Tensor) -> Reading | None:
        """Take the numbers (1-D, on any device) of a step; returns the reading of the step before."""
        ended: Moment | None = None  # on other devices: known when the numbers have arrived
        if numbers.is_cuda:
            host = empty_pinned(numbers.shape, numbers.dtype)
            numbers = host.copy_(numbers, non_blocking=True)
            ended = Moment(self.now(), _record_event())
        elif numbers.device.type == "cpu":
            ended = Moment(self.now())
        before = self.flush() if self._waiting is not None else None
        self._waiting = (step, numbers, ended)
        return before

    def flush(self) -> Reading | None:
        """Return the reading that is still waiting, if any; the host waits for the device."""
        if self._waiting is None:
            return None
        (step, numbers, ended), self._waiting = self._waiting, None
        if ended is not None and ended.event is not None:
            ended.event.synchronize()
        values = tuple(numbers.tolist())
        if ended is None:
            ended = Moment(self.now())
        seconds = None if self._last is None else self._last.seconds_to(ended)
        self._last = ended
        return replace(step, values=values, seconds=seconds)


def _record_event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
