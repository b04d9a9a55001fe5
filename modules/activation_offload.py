"""What checkpointed blocks keep, their inputs, waits in host memory between forward and backward pass.

Copies run beside the computation: an input leaves while its block computes, and comes back while the block after it is
differentiated. A copy that is under way holds its source; the source is let go when the next input is handed over, by which time
the copy is done, after the computing stream has been told to wait for it. So memory is given free in the order of that stream, and
however far Python runs ahead, the device holds two inputs that leave or two that come.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

ALIGNMENT = 256  # bytes
PIECES = 8  # of which a slab of host memory has at most twice as many

Wait = Callable[[], None]  # has what is computed from now on wait for a copy


class Transfer(Protocol):
    """Copies between a device and host memory."""

    def allocate(self, size_bytes: int) -> Tensor: ...  # host memory: uint8

    def save(self, source: Tensor, host: Tensor) -> Wait: ...  # start copying; both stay untouched until waited for

    def fetch(self, host: Tensor, device: torch.device) -> tuple[Tensor, Wait]: ...  # start copying; not to be read before waiting


class PlainTransfer:
    """Copies at once, for devices without streams. On a CPU nothing is won, and nothing else happens."""

    def allocate(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)

    def save(self, source: Tensor, host: Tensor) -> Wait:
        host.copy_(source)
        return _nothing

    def fetch(self, host: Tensor, device: torch.device) -> tuple[Tensor, Wait]:
        return host.to(device, copy=True), _nothing


class CudaTransfer:
    """Copies on a stream of its own, from and to pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def allocate(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def save(self, source: Tensor, host: Tensor) -> Wait:
        return self._copy(source, host)

    def fetch(self, host: Tensor, device: torch.device) -> tuple[Tensor, Wait]:
        # of the computing stream's memory, which that stream also gives free: no record_stream, which would delay its reuse
        target = torch.empty(host.shape, dtype=host.dtype, device=device)
        return target, self._copy(host, target)

    def _copy(self, source: Tensor, target: Tensor) -> Wait:
        computing = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(computing)  # the source is computed; nothing uses the target's memory any more
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        done = self._stream.record_event()
        return lambda: torch.cuda.current_stream(self._stream.device).wait_event(done)


def transfer_for(device: torch.device) -> Transfer:
    """The way of copying that the device has."""
    return CudaTransfer(device) if device.type == "cuda" else PlainTransfer()


class HostMemory:
    """Pieces of host memory that are used again and again: pinning takes long, so it happens in the first steps only."""

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self._allocate = allocate
        self._free: list[Tensor] = []
        self.size_bytes = 0  # of all pieces that are in use or wait for it

    def take(self, size_bytes: int) -> Tensor:
        """At least that much, uint8. Give it back with `put`."""
        size_bytes = math.ceil(size_bytes / ALIGNMENT) * ALIGNMENT
        fitting = [piece for piece in self._free if piece.numel() >= size_bytes]
        if not fitting:
            self.size_bytes -= sum(piece.numel() for piece in self._free)
            self._free.clear()  # too small for the size there is now; what takes their place serves smaller ones too
            pieces, slab = slab_of(size_bytes)
            fitting = list(self._allocate(slab)[: pieces * size_bytes].split(size_bytes))
            self._free.extend(fitting)
            self.size_bytes += pieces * size_bytes
        best = min(fitting, key=Tensor.numel)
        self._free = [piece for piece in self._free if piece is not best]
        return best

    def put(self, piece: Tensor) -> None:
        """Free to be taken again. Copies that are under way have to be on the stream that later ones are on."""
        self._free.append(piece)


def slab_of(size_bytes: int) -> tuple[int, int]:
    """How many pieces of that size to allocate together, and the bytes of the slab.

    torch rounds pinned memory up to a power of two, which could be nearly twice the size of one piece.
    """
    slab = 1 << (size_bytes - 1).bit_length()
    choices = [slab << exponent for exponent in range(PIECES.bit_length())]
    best = next((choice for choice in choices if choice % size_bytes <= choice // 8), None)
    best = best or min(choices, key=lambda choice: choice % size_bytes / choice)
    return best // size_bytes, best


@dataclass(eq=False)
class _Away:
    """An input in host memory. Its piece is given back when autograd forgets it, after its backward pass."""

    host: Tensor  # in its shape and dtype
    device: torch.device
    before: "weakref.ref[_Away] | None"  # what came just before in this forward pass, and is needed just after
    coming: tuple[Tensor, Wait] | None = field(default=None)


class Offload:
    """Where checkpointed blocks keep their inputs, in the place of the device. One for all blocks of a network."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self.memory = HostMemory(transfer.allocate)
        self._last: weakref.ref[_Away] | None = None
        self._leaving: tuple[Tensor, Wait] | None = None

    def begin(self) -> None:
        """A new forward pass: nothing before it is fetched together with what follows."""
        self._last = None

    def hooks(self) -> saved_tensors_hooks:
        """A context in which what autograd keeps goes to host memory."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> "Tensor | _Away":
        self._let_go()
        if not tensor.is_contiguous():  # the copy that comes back would have other strides, and compiled code know it
            return tensor
        piece = self.memory.take(tensor.nbytes)
        host = piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        source = tensor.detach()
        self._leaving = source, self._transfer.save(source, host)
        away = _Away(host, tensor.device, self._last)
        weakref.finalize(away, self.memory.put, piece).atexit = False
        self._last = weakref.ref(away)
        return away

    def _unpack(self, kept: "Tensor | _Away") -> Tensor:
        self._let_go()
        if isinstance(kept, Tensor):
            return kept
        tensor, wait = kept.coming or self._transfer.fetch(kept.host, kept.device)
        kept.coming = None
        wait()
        before = None if kept.before is None else kept.before()
        if before is not None and before.coming is None:
            before.coming = self._transfer.fetch(before.host, before.device)
        return tensor

    def _let_go(self) -> None:
        if self._leaving is not None:
            self._leaving[1]()
            self._leaving = None


def _nothing() -> None:
    """The copy is done already."""
