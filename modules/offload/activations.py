"""What checkpointed blocks keep, their inputs, waits in host memory between forward and backward pass.

Copies run beside the computation: an input leaves while its block computes, and comes back while the block
after it is differentiated. A copy that is under way holds its source; the source is let go when the next
input is handed over, by which time the copy is done, after the computing stream has been told to wait for it.
So memory is given free in the order of that stream, and however far Python runs ahead, the device holds two
inputs that leave or two that come.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from modules.contract.loading import TensorInfo
from modules.offload.host_memory import allocate
from modules.offload.transfer import Transfer, transfer_to

ALIGNMENT = 256  # bytes


class HostMemory:
    """Pieces of host memory that are used again and again: pinning takes long, so it happens in the first
    steps only.
    """

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        """make: memory of so many bytes, uint8."""
        self._make = make
        self._free: list[Tensor] = []
        self.size_bytes = 0  # of all pieces that are in use or wait for it

    def take(self, size_bytes: int) -> Tensor:
        """At least that much, uint8. Give it back with `put`."""
        fitting = [piece for piece in self._free if piece.numel() >= size_bytes]
        if fitting:
            best = min(fitting, key=Tensor.numel)
            self._free = [piece for piece in self._free if piece is not best]
            return best
        # too small for the sizes there are now, while what takes its place serves smaller ones too
        if self._free:
            self.size_bytes -= self._free.pop().numel()
        size_bytes = math.ceil(size_bytes / ALIGNMENT) * ALIGNMENT
        self.size_bytes += size_bytes
        return self._make(size_bytes)

    def put(self, piece: Tensor) -> None:
        """Free to be taken again."""
        self._free.append(piece)


@dataclass(eq=False)
class _Away:
    """An input in host memory. Its piece is given back when autograd forgets it, after its backward pass."""

    host: Tensor  # in its shape and dtype
    device: torch.device
    # what came just before in this forward pass, and is needed just after
    before: "weakref.ref[_Away] | None"
    # at most one, with the moment at which it is there
    coming: list[tuple[Tensor, Any]] = field(default_factory=list)


class Offload:
    """Where checkpointed blocks keep their inputs, in the place of the device.

    One for all blocks of a network.
    """

    def __init__(self, transfer: Transfer, make: Callable[[int], Tensor]) -> None:
        """make: host memory of so many bytes, uint8."""
        self._transfer = transfer
        self.memory = HostMemory(make)
        self._last: weakref.ref[_Away] | None = None
        self._leaving: tuple[Tensor, Any] | None = None  # and the moment at which its copy is done

    def begin(self) -> None:
        """A new forward pass: nothing before it is fetched together with what follows."""
        self._last = None

    def hooks(self) -> saved_tensors_hooks:
        """A context in which what autograd keeps goes to host memory."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> "Tensor | _Away":
        self._let_go()
        # the copy that comes back would have other strides, and compiled code know it
        if not tensor.is_contiguous():
            return tensor
        piece = self.memory.take(tensor.nbytes)
        host = piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        source = tensor.detach()
        self._leaving = source, self._transfer.copy([(host, source)], self._transfer.mark())
        away = _Away(host, tensor.device, self._last)
        weakref.finalize(away, self._forget, piece, away.coming).atexit = False
        self._last = weakref.ref(away)
        return away

    def _unpack(self, kept: "Tensor | _Away") -> Tensor:
        self._let_go()
        if isinstance(kept, Tensor):
            return kept
        self._send_for(kept)
        tensor, moment = kept.coming.pop()
        self._transfer.wait(moment)
        before = None if kept.before is None else kept.before()
        if before is not None:
            self._send_for(before)
        return tensor

    def _send_for(self, away: _Away) -> None:
        """Have it copied back, if it is not on its way."""
        if not away.coming:
            # of the computing stream's memory, which that stream also gives free; record_stream would hold it
            # back for longer
            target = torch.empty(away.host.shape, dtype=away.host.dtype, device=away.device)
            away.coming.append((target, self._transfer.copy([(target, away.host)], self._transfer.mark())))

    def _let_go(self) -> None:
        if self._leaving is not None:
            self._transfer.wait(self._leaving[1])
            self._leaving = None

    def _forget(self, piece: Tensor, coming: list[tuple[Tensor, Any]]) -> None:
        # sent for and never used: nothing else may have its memory before the copy is done
        for _, moment in coming:
            self._transfer.wait(moment)
        self.memory.put(piece)  # a later copy into it comes after those out of it


def offload_to_host(device: torch.device) -> Offload:
    """What fits the device. On a CPU inputs are copied and nothing is won."""

    def make(size_bytes: int) -> Tensor:
        return allocate({"": TensorInfo(torch.uint8, (size_bytes,))}, pinned=device.type == "cuda").tensors[
            ""
        ]

    return Offload(transfer_to(device), make)
