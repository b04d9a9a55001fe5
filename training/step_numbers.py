"""The numbers that a step leaves on the device, in one row, and where each of them stands.

The loss; if there are several experts the sum of the losses and the count of micro-batches of each; of
several processes what they wish for; at the end norms.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.contract.experts import Expert


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
