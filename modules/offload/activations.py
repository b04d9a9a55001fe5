"""Keep the inputs of checkpointed blocks in host memory between forward and backward pass.

Copies overlap with the computation: an input is copied to the host while its block computes, and back while
the following block runs its backward pass. A running copy holds its source. The source is released when the
next input is offloaded (the copy is done by then), after the computing stream has been made to wait for the
copy. So memory is freed in the order of that stream, and however far Python runs ahead, the device holds at
most two inputs that are leaving or two that are returning.
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
    """Reusable pieces of host memory: pinning is slow, so it happens in the first steps only."""

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        """make: memory of so many bytes, uint8."""
        self._make = make
        self._free: list[Tensor] = []
        self.size_bytes = 0  # of all pieces, in use or free

    def take(self, size_bytes: int) -> Tensor:
        """Return a piece of at least that size, uint8. Give it back with `put`."""
        fitting = [piece for piece in self._free if piece.numel() >= size_bytes]
        if fitting:
            best = min(fitting, key=Tensor.numel)
            self._free = [piece for piece in self._free if piece is not best]
            return best
        # all free pieces are too small: drop one, as the larger new one also serves smaller sizes
        if self._free:
            self.size_bytes -= self._free.pop().numel()
        size_bytes = math.ceil(size_bytes / ALIGNMENT) * ALIGNMENT
        self.size_bytes += size_bytes
        return self._make(size_bytes)

    def put(self, piece: Tensor) -> None:
        """Make a piece free to be taken again."""
        self._free.append(piece)


@dataclass(eq=False)
class _Away:
    """An input in host memory. Its piece is freed when autograd drops it, after its backward pass."""

    host: Tensor  # with the input's shape and dtype
    device: torch.device
    # the input before this one in the forward pass, which the backward pass needs next
    before: "weakref.ref[_Away] | None"
    # at most one copy on its way to the device, with the moment at which it arrives
    coming: list[tuple[Tensor, Any]] = field(default_factory=list)


class Offload:
    """Host storage for the inputs of checkpointed blocks. One object serves all blocks of a network."""

    def __init__(self, transfer: Transfer, make: Callable[[int], Tensor]) -> None:
        """make: host memory of so many bytes, uint8."""
        self._transfer = transfer
        self.memory = HostMemory(make)
        self._last: weakref.ref[_Away] | None = None
        self._leaving: tuple[Tensor, Any] | None = None  # a source, and the moment at which its copy is done

    def begin(self) -> None:
        """Start a new forward pass: earlier inputs are not fetched ahead with its own."""
        self._last = None

    def hooks(self) -> saved_tensors_hooks:
        """Return a context in which tensors that autograd keeps go to host memory."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> "Tensor | _Away":
        self._let_go()
        # the returning copy would have other strides, which compiled code relies on
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
        """Start copying it back to the device, unless it is already on its way."""
        if not away.coming:
            # allocated on the computing stream, which also frees it; record_stream would hold it for longer
            target = torch.empty(away.host.shape, dtype=away.host.dtype, device=away.device)
            away.coming.append((target, self._transfer.copy([(target, away.host)], self._transfer.mark())))

    def _let_go(self) -> None:
        if self._leaving is not None:
            self._transfer.wait(self._leaving[1])
            self._leaving = None

    def _forget(self, piece: Tensor, coming: list[tuple[Tensor, Any]]) -> None:
        # fetched and never used: its memory must not be reused before the copy is done
        for _, moment in coming:
            self._transfer.wait(moment)
        self.memory.put(piece)  # safe: later copies into it run after those out of it


def offload_to_host(device: torch.device) -> Offload:
    """Return an `Offload` for the device. On a CPU inputs are copied too, which saves nothing."""

    is_told = False

    def make(size_bytes: int) -> Tensor:
        nonlocal is_told
        held = allocate({"": TensorInfo(torch.uint8, (size_bytes,))}, pinned=device.type == "cuda")
        if not is_told:
            held.warn_if_unlocked()
            is_told = held.unlocked_bytes > 0
        return held.tensors[""]

    return Offload(transfer_to(device), make)
