"""Read the numbers that a step leaves on the device one step later, so that the host never waits for them.

They are one row: the loss; what processes wish (`WISHES`); if there are several experts the sum of the losses
and the count of micro-batches of each; at the end norms.

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
from networks.adapter import NormReport

WISHES = slice(1, 4)  # of a row: how many processes ask to end, to save, and for samples


@dataclass(frozen=True)
class StepReport:
    """Hold what is reported of an optimizer step; the row and what follows from it is known a step later."""

    step: int  # from 1
    rates: Mapping[str, float]  # learning rates as `name_rates` gives them
    keys: tuple[str, ...] = ()  # the items this process trained on
    sizes: Hashable = None  # of the items: steps that share them take as long
    row: tuple[float, ...] = ()
    seconds: float | None = None  # that the step took, without pauses; None: the clock was not started
    loss: float = 0.0
    average: float = 0.0  # of the losses of the last epoch-length window
    gradient_norm: float | None = None  # before clipping
    norms: NormReport | None = None  # of --scale_weight_norms
    # losses of the experts that had micro-batches in the step, by name; none if there is one expert
    by_expert: Mapping[str, float] = field(default_factory=dict)


def losses_by_expert(row: Sequence[float], experts: Sequence[Expert]) -> dict[str, float]:
    """Return the mean loss of a step's micro-batches for each expert that had some, by the expert's name."""
    count = len(experts)
    if count == 1:
        return {}
    numbers = row[WISHES.stop :]
    parts = zip(experts, numbers[:count], numbers[count : 2 * count], strict=True)
    return {expert.name: total / batches for expert, total, batches in parts if batches}


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
    """Keep the row of the last step until it has arrived. `now` returns seconds."""

    now: Callable[[], float] = time.monotonic
    _waiting: tuple[StepReport, Tensor, Moment | None] | None = field(default=None, init=False)
    _last: Moment | None = field(default=None, init=False)  # end of the last step or pause

    def restart_clock(self, device: torch.device) -> None:
        """Exclude the time until now (samples, saving, validation) from the next step."""
        self._last = self._moment(device.type)

    def push(self, step: StepReport, row: Tensor) -> StepReport | None:
        """Take the row (1-D, on any device) of a step; returns the step before with its row."""
        kind = row.device.type
        if row.is_cuda:
            row = empty_pinned(row.shape, row.dtype).copy_(row, non_blocking=True)
        # on other devices: known when the numbers have arrived
        ended = self._moment(kind) if kind in {"cuda", "cpu"} else None
        before = self.flush()
        self._waiting = (step, row, ended)
        return before

    def flush(self) -> StepReport | None:
        """Return the step that is still waiting, if any; the host waits for the device."""
        if self._waiting is None:
            return None
        (step, row, ended), self._waiting = self._waiting, None
        if ended is not None and ended.event is not None:
            ended.event.synchronize()
        values = tuple(row.tolist())
        ended = ended or self._moment("")
        seconds = None if self._last is None else self._last.seconds_to(ended)
        self._last = ended
        return replace(step, row=values, seconds=seconds)

    def _moment(self, device: str) -> Moment:
        event = None
        if device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return Moment(self.now(), event)
