"""Copies between host memory and a device that run beside its computing: all that swapping knows of a
device.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Pairs = Sequence[tuple[Tensor, Tensor]]  # (target, source), of one size


class Transfer(Protocol):
    """Copies are done in the order in which they were asked for.

    A moment is whatever `mark` and `copy` return.
    """

    def memory(self, size_bytes: int) -> Tensor: ...  # on the device, uint8, content undefined

    def mark(self) -> Any: ...  # the moment at which all computing asked for so far is done

    # begin at that moment; returns the moment at which it is done
    def copy(self, pairs: Pairs, after: Any) -> Any: ...

    def wait(self, moment: Any) -> None: ...  # computing asked for from now on begins after that moment

    def finish(self) -> None: ...  # return when all copies are done


class PlainTransfer:
    """For devices whose copies need no stream of their own, such as the CPU: each is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def memory(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)

    def mark(self) -> None:
        """All that was asked for is done, or will be done in order."""

    def copy(self, pairs: Pairs, after: None) -> None:
        for target, source in pairs:
            target.copy_(source)

    def wait(self, moment: None) -> None: ...

    def finish(self) -> None: ...


class CudaTransfer:
    """A stream beside the one that computes. Moments are events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def memory(self, size_bytes: int) -> Tensor:
        memory = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
        # should it be freed while a copy into it is under way, torch gives it to nobody until that is done
        memory.record_stream(self._stream)
        return memory

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, pairs: Pairs, after: torch.cuda.Event) -> torch.cuda.Event:
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, moment: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(moment)

    def finish(self) -> None:
        self._stream.synchronize()


def transfer_to(device: torch.device) -> Transfer:
    """What fits the device."""
    return CudaTransfer(device) if device.type == "cuda" else PlainTransfer(device)
