"""Copies between host memory and a device that overlap with its computation.

Swapping uses a device through nothing else.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Pairs = Sequence[tuple[Tensor, Tensor]]  # (target, source), of one size


class Transfer(Protocol):
    """Copies to and from a device, in the order in which they are requested.

    A moment is whatever `mark` and `copy` return.
    """

    def memory(self, size_bytes: int) -> Tensor: ...  # on the device, uint8, uninitialised

    def mark(self) -> Any: ...  # the moment at which all computation queued so far is done

    # starts after that moment; returns the moment at which it is done
    def copy(self, pairs: Pairs, after: Any) -> Any: ...

    def wait(self, moment: Any) -> None: ...  # computation queued from now on starts after that moment

    def finish(self) -> None: ...  # returns when all copies are done


class PlainTransfer:
    """For devices whose copies need no stream of their own, such as the CPU: each is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def memory(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)

    def mark(self) -> None:
        """Return None: all work is done already, or runs in order."""

    def copy(self, pairs: Pairs, after: None) -> None:
        for target, source in pairs:
            target.copy_(source)

    def wait(self, moment: None) -> None: ...

    def finish(self) -> None: ...


class CudaTransfer:
    """For CUDA: copies in a stream of their own. Moments are events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def memory(self, size_bytes: int) -> Tensor:
        memory = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
        # if it is freed during a copy into it, torch does not reuse it before the copy is done
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
    """Return the transfer for the device."""
    return CudaTransfer(device) if device.type == "cuda" else PlainTransfer(device)


def offload_layer(layer: nn.Module, host: Tensor, device: torch.device) -> None:
    """Keep the layer's weight in host memory, except while its forward runs.

    host: that memory, already holding the weight. For frozen layers at the start of a network: if their
    backward pass needs the weight, autograd keeps it on the device.
    """
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    weight.data = host
    layer.forward = functools.partial(_run_moved, layer.forward, weight, host, device)


def _run_moved(
    forward: Callable[..., Any],
    weight: nn.Parameter,
    host: Tensor,
    device: torch.device,
    *inputs: Any,
    **named: Any,
) -> Any:
    # copied in the computing stream: no waiting is needed
    weight.data = host.to(device, non_blocking=True, copy=True)
    try:
        return forward(*inputs, **named)
    finally:
        weight.data = host
