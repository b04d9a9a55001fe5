"""Gradient checkpointing: trade compute and host memory for activation memory, from outside the network.

`Offload` keeps the inputs of checkpointed blocks in host memory between forward and backward pass. Copies
overlap with the computation: an input is copied to the host while its block computes, and back while the
following block runs its backward pass. A running copy holds its source. The source is released when the next
input is offloaded (the copy is done by then), after the computing stream has been made to wait for the copy.
So memory is freed in the order of that stream, and however far Python runs ahead, the device holds at most
two inputs that are leaving or two that are returning.
"""

import math
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from modules.contract.family import DitSpec
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


# prefixes of the names of attention operators, torch's and those of the optional packages
ATTENTION = (
    "aten::_scaled_dot_product_flash_attention",  # also _for_cpu
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "aten::_cudnn_attention_forward",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
    "flash_attn_3::_flash_attn_forward",
    "xformers_flash::flash_fwd",
    "xformers_flash3::flash_fwd",
    "xformers::efficient_attention_forward",
    "planned::attention",  # in dry runs
)
# attention without a kernel: on a CPU, for few tokens
WRITTEN_OUT = ("aten::bmm", "aten::_softmax", "aten::_safe_softmax")
# attention to fewer keys than a quarter of the queries is cheap compared with the memory of its result
SHORT = 4


@dataclass(frozen=True)
class _Block:
    """The forward of one checkpointed block."""

    module: nn.Module
    forward: Callable[..., Tensor]
    keeps_attention: bool
    offload: Offload | None
    is_first: bool

    def __call__(self, *inputs: Any) -> Tensor:
        if not (self.module.training and torch.is_grad_enabled()):
            return self.forward(*inputs)
        if self.offload is not None and self.is_first:
            self.offload.begin()
        # autograd does not keep results that need no gradient, and compiled code may then overwrite them
        keeps = self.keeps_attention and any(
            isinstance(value, Tensor) and value.requires_grad for value in inputs
        )
        contexts = reuse_attention if keeps else noop_context_fn
        kept: AbstractContextManager[object] = nullcontext() if self.offload is None else self.offload.hooks()
        with kept:
            return checkpoint(self.forward, *inputs, use_reentrant=False, context_fn=contexts)


def checkpoint_blocks(
    dit: nn.Module, spec: DitSpec, keep_attention: bool = False, offload: Offload | None = None
) -> None:
    """Make every block keep only its inputs, and recompute its activations in the backward pass.

    keep_attention: also keep the result of self-attention, so that its kernel runs once. offload: keeps the
    tensors that are direct arguments of a block; those of the last block stay on the device, as they are
    needed next. Has an effect in train mode with gradients on only. Call after LoRA and compilation: it wraps
    the `forward` that a block has then.
    """
    blocks = list(chain.from_iterable(spec.blocks(dit).values()))
    for index, block in enumerate(blocks):
        place = None if block is blocks[-1] else offload
        block.forward = _Block(block, block.forward, keep_attention, place, is_first=index == 0)


def reuse_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of computing and recomputing a block; the second reuses attention's results."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: SelectiveCheckpointContext, operator: Any, *inputs: Any, **named: Any) -> CheckpointPolicy:
    """Keep the result of an expensive attention, by the operator's name and the size of query and key."""
    name, tensors = operator.name(), (*inputs, *named.values())
    if name.startswith(ATTENTION):
        keeps = "backward" not in name and tensors[1].numel() * SHORT >= tensors[0].numel()
    else:
        keeps = name.startswith(WRITTEN_OUT) and tensors[0].device.type == "cpu"
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE
