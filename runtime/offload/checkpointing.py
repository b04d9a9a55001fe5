"""Gradient checkpointing: trade compute and host memory for activation memory, from outside the network.

`Offload` keeps the inputs of checkpointed blocks in host memory between forward and backward pass. Copies
overlap with the computation: an input is copied to the host while its block computes, and back while the
following block runs its backward pass. A running copy keeps its source alive. The source is released when the
next input is offloaded (the copy is done by then), after the computing stream waits for the copy.
So memory is freed in the order of that stream. No matter how far Python runs ahead, the device holds at most
two inputs that are being offloaded or two that are being fetched.

A block's token-wise layers may run on a few thousand tokens at a time. The hidden layer of a feed-forward is
several times as wide as the tokens, and takes most of the live memory in the backward pass of a checkpointed
block. It is only needed for one piece of the tokens at a time, so each piece is a checkpoint of its own. A
nested checkpoint usually computes pieces a third time: forward, recomputing the block, recomputing the piece.
Here it does not: the pieces keep only their common inputs, which are saved once, before the first piece. At
that point torch stops recomputing the block (its early stop), and continues piece by piece.
"""

import functools
import math
import types
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
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

from modules.integers import ceil_div
from modules.private_torch import function_modes
from protocols.family import DitSpec
from protocols.loading import TensorInfo
from runtime.offload.host_memory import Transfer, allocate, transfer_to

ALIGNMENT = 256  # bytes


class HostMemory:
    """Reusable pieces of host memory. Pinning is slow, so only the first steps allocate."""

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        """Start without memory.

        Args:
            make: Allocates a uint8 tensor of a number of bytes.
        """
        self._make = make
        self._free: list[Tensor] = []
        self.size_bytes = 0  # size of all pieces, in use or free

    def take(self, size_bytes: int) -> Tensor:
        """Return a uint8 piece of at least that size. Return it with `put`."""
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
        """Give back a piece that `take` returned, for reuse."""
        self._free.append(piece)


@dataclass(eq=False)
class _OffloadedInput:
    """Autograd's placeholder for a block's input in host memory, which is freed together with it."""

    host: Tensor  # with the input's shape and dtype
    device: torch.device
    # the input before this one in the forward pass, which the backward pass needs next
    previous: "weakref.ref[_OffloadedInput] | None"
    # at most one running copy to the device: the target, and the event of the copy's end
    running_copies: list[tuple[Tensor, Any]] = field(default_factory=list)


class Offload:
    """Host storage for the inputs of checkpointed blocks, shared by all blocks of a network."""

    def __init__(self, transfer: Transfer, make: Callable[[int], Tensor]) -> None:
        """Start without memory.

        Args:
            transfer: Copies between host and device.
            make: Allocates a uint8 tensor of a number of bytes in host memory.
        """
        self._transfer = transfer
        self.memory = HostMemory(make)
        self._last: weakref.ref[_OffloadedInput] | None = None
        self._running_offload: tuple[Tensor, Any] | None = None  # source, and event of the copy's end

    def begin_forward(self) -> None:
        """Start a new forward pass; its inputs are prefetched separately from earlier passes."""
        self._last = None

    def hooks(self) -> saved_tensors_hooks:
        """Return hooks for autograd that move saved tensors to the host and back."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> "Tensor | _OffloadedInput":
        """Start copying a tensor saved by autograd to the host; return a placeholder for it."""
        self._release_offloaded_source()
        # the copy back would have other strides, and compiled code relies on strides
        if not tensor.is_contiguous():
            return tensor
        piece = self.memory.take(tensor.nbytes)
        host = piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        source = tensor.detach()
        self._running_offload = source, self._transfer.copy([(host, source)], self._transfer.record_event())
        offloaded = _OffloadedInput(host, tensor.device, self._last)
        weakref.finalize(offloaded, self._recycle, piece, offloaded.running_copies).atexit = False
        self._last = weakref.ref(offloaded)
        return offloaded

    def _unpack(self, packed: "Tensor | _OffloadedInput") -> Tensor:
        """Return a saved input on the device, and start copying the one that the backward pass needs next."""
        self._release_offloaded_source()
        if isinstance(packed, Tensor):
            return packed
        self._start_fetch(packed)
        tensor, done = packed.running_copies.pop()
        self._transfer.wait(done)
        previous = None if packed.previous is None else packed.previous()
        if previous is not None:
            self._start_fetch(previous)
        return tensor

    def _start_fetch(self, offloaded: _OffloadedInput) -> None:
        """Start copying an input back to the device, unless the copy is already running."""
        if not offloaded.running_copies:
            # allocated on the computing stream, which also frees it; record_stream would keep it for longer
            target = torch.empty(offloaded.host.shape, dtype=offloaded.host.dtype, device=offloaded.device)
            offloaded.running_copies.append(
                (target, self._transfer.copy([(target, offloaded.host)], self._transfer.record_event()))
            )

    def _release_offloaded_source(self) -> None:
        if self._running_offload is not None:
            self._transfer.wait(self._running_offload[1])
            self._running_offload = None

    def _recycle(self, piece: Tensor, running_copies: list[tuple[Tensor, Any]]) -> None:
        # fetched but never used: its memory must not be reused before the copy is done
        for _, done in running_copies:
            self._transfer.wait(done)
        self.memory.put(piece)  # safe: later copies into it run after those out of it


def offload_to_host(device: torch.device) -> Offload:
    """Return an `Offload` for the device. On a CPU inputs are copied too, although that saves nothing."""

    def make(size_bytes: int) -> Tensor:
        info = TensorInfo(torch.uint8, (size_bytes,))
        return allocate({"": info}, pinned=device.type == "cuda").tensors[""]

    return Offload(transfer_to(device), make)


# prefixes of the names of attention operators, in torch and in the optional packages
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
# operators of attention without a fused kernel, on a CPU for few tokens
WRITTEN_OUT = ("aten::bmm", "aten::_softmax", "aten::_safe_softmax")
# attention to fewer keys than a quarter of the queries is cheap compared with the memory of its result
SHORT = 4


@dataclass(frozen=True)
class _CheckpointedForward:
    """The forward of one checkpointed block, which keeps only its inputs for the backward pass."""

    module: nn.Module
    forward: Callable[..., Tensor]
    keeps_attention: bool
    offload: Offload | None
    is_first: bool

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        """Run the block; in train mode with gradients, checkpoint it."""
        if not (self.module.training and torch.is_grad_enabled()):
            return self.forward(*inputs, **named)
        if self.offload is not None and self.is_first:
            self.offload.begin_forward()
        # autograd does not keep results that need no gradient, and compiled code may then overwrite them
        keeps_attention = self.keeps_attention and any(
            isinstance(value, Tensor) and value.requires_grad for value in inputs
        )
        context_fn = noop_context_fn
        if keeps_attention:
            context_fn = functools.partial(create_selective_checkpoint_contexts, _choose_saved_results)
        offload: AbstractContextManager[object] = (
            nullcontext() if self.offload is None else self.offload.hooks()
        )
        with offload:
            return checkpoint(self.forward, *inputs, use_reentrant=False, context_fn=context_fn, **named)


def checkpoint_blocks(
    dit: nn.Module, spec: DitSpec, keep_attention: bool = False, offload: Offload | None = None
) -> None:
    """Make every block keep only its inputs, and recompute its activations in the backward pass.

    This affects only train mode with gradients enabled. Call it after adding LoRAs and compiling, because
    it wraps the `forward` that a block has at that time.

    Args:
        dit: The transformer.
        spec: Names of the network's blocks.
        keep_attention: Whether to keep the result of self-attention too, so that its kernel runs only once.
        offload: Moves the inputs of blocks to the host, except those of the last block, which the backward
            pass needs first; None keeps all inputs on the device.
    """
    blocks = recomputed_parts(dit, spec)
    for index, block in enumerate(blocks):
        # the backward pass starts with the last block, so moving its inputs would save no memory
        block_offload = None if block is blocks[-1] else offload
        block.forward = _CheckpointedForward(
            block, block.forward, keep_attention, block_offload, is_first=index == 0
        )


def recomputed_parts(dit: nn.Module, spec: DitSpec) -> list[nn.Module]:
    """Return the parts of a network that are recomputed, each by itself, in the order in which they run."""
    parts: list[nn.Module] = []
    for block in spec.blocks_in_order(dit):
        layers = (
            getattr(block, spec.checkpointed_layers_attribute, ())
            if spec.checkpointed_layers_attribute
            else ()
        )
        parts += layers or [block]
    return parts


def _choose_saved_results(
    _: SelectiveCheckpointContext, operator: Any, *inputs: Any, **named: Any
) -> CheckpointPolicy:
    """Save the result of an attention that is expensive to recompute, and recompute other operators."""
    name = operator.name()
    tensors = (*inputs, *named.values())
    if name.startswith(ATTENTION):
        keeps = "backward" not in name and tensors[1].numel() * SHORT >= tensors[0].numel()
    else:
        keeps = name.startswith(WRITTEN_OUT) and tensors[0].device.type == "cpu"
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


# Letters: B batch, L tokens, C width


# enough tokens to keep a GPU busy, although every piece reads (and dequantizes) the weights again
TOKENS = 4096
# attribute of a layer: if it is true, the layer's block is not computed in pieces
WHOLE_INPUT_FLAG = "sees_whole_input"

Method = Callable[..., Tensor]


def compute_in_pieces(dit: nn.Module, spec: DitSpec, tokens: int = TOKENS) -> None:
    """Make blocks run `spec.token_wise_methods` on at most `tokens` tokens at a time, to save memory.

    These methods map (x: B L C, ...) to B L C'. This affects only train mode with gradients enabled. Call it
    after adding LoRAs, and before compilation and `checkpoint_blocks`. Results differ only by the order of
    summation in matrix products. Blocks with a layer that sets `sees_whole_input` are not changed.
    """
    # one function for all blocks of a class: compiled code knows functions by identity
    changed: dict[Method, Method] = {}
    for block in chain.from_iterable(spec.blocks(dit).values()):
        if any(getattr(layer, WHOLE_INPUT_FLAG, False) for layer in block.modules()):
            continue
        for name in spec.token_wise_methods:
            method = getattr(type(block), name, None)
            if method is not None:
                changed.setdefault(method, _in_pieces(method, tokens))
                setattr(block, name, types.MethodType(changed[method], block))


def _in_pieces(method: Method, tokens: int) -> Method:
    """Return a method that splits its first input into pieces of `tokens` tokens, and checkpoints each."""

    def run(block: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
        num_pieces = ceil_div(x.shape[1], tokens)
        if num_pieces == 1 or not (block.training and torch.is_grad_enabled()):
            return method(block, x, *inputs)
        # compiled code chooses by itself which inputs to save, so they need not be shared here
        if torch.compiler.is_compiling():
            pieces = x.chunk(num_pieces, dim=1)

            def compute(piece: Tensor) -> Tensor:
                return method(block, piece, *inputs)

            return torch.cat([checkpoint(compute, piece, use_reentrant=False) for piece in pieces], dim=1)
        # Checkpoint each piece of x, B L C, while all pieces share one saved copy of the inputs
        shared = _SharedInputs(method, block, num_pieces, inputs=(x, *inputs))
        # `checkpoint` takes the device from the tensors in its arguments. A tensor in a tuple is not saved,
        # which would happen only after its piece was computed
        device_tensor = (x.new_empty(0),)
        outputs = [
            checkpoint(shared.compute_piece, index, device_tensor, use_reentrant=False)
            for index in range(num_pieces)
        ]
        shared.release()
        return torch.cat(outputs, dim=1)

    return run


class _SaveTensors(torch.autograd.Function):
    """A node of the autograd graph that only saves tensors, so that the backward pass can read them."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise AssertionError("this node only saves tensors")


class _SharedInputs:
    """The inputs that all pieces of a call share.

    This object keeps them during the forward pass, until `release`. After that, they are only saved in a node
    of the autograd graph (`_SaveTensors`); the backward pass reads them from there, which makes torch
    recompute the block.
    """

    def __init__(self, method: Method, block: nn.Module, count: int, inputs: tuple[Any, ...]) -> None:
        """Prepare to compute a method in pieces of its first input.

        Args:
            method: The method.
            block: The block that it belongs to.
            count: Number of pieces.
            inputs: Inputs of the method; the first one, B L C, is cut along L.
        """
        self._method = method
        self._block = block
        self._count = count
        # inputs that are not tensors; None at the positions of tensors
        self._non_tensor_inputs = [None if isinstance(value, Tensor) else value for value in inputs]
        self._tensor_indices = [index for index, value in enumerate(inputs) if isinstance(value, Tensor)]
        tensors = [inputs[index] for index in self._tensor_indices]
        self._requires_grad = [tensor.requires_grad for tensor in tensors]
        # the output, not its node: before torch 2.13 a node frees what it saved when its output is gone
        self._saved_output: Any = _SaveTensors.apply(torch.empty(0, requires_grad=True), *tensors)
        self._tensors: list[Tensor] | None = tensors
        # split once, so that the pieces' gradients are joined once
        self._pieces = inputs[0].chunk(count, dim=1)
        self._num_recomputed = 0  # pieces, in the backward pass
        # modes of a run on fake tensors (a memory plan), which torch disables during `backward`
        self._modes = function_modes()

    def release(self) -> None:
        """Release the inputs once all pieces have been computed; the backward pass restores them."""
        self._tensors = None
        self._pieces = ()
        self._num_recomputed = 0

    def compute_piece(self, index: int, _: object) -> Tensor:
        """Compute one piece; `checkpoint` calls it in the forward pass, and again in the backward pass."""
        # the forward pass ends with `release`, so that only the backward pass finds no tensors
        if self._tensors is not None and self._num_recomputed == 0:
            return self._method(self._block, *self._gather_inputs(index, self._tensors))
        if self._tensors is None:
            # Read the saved inputs from the graph; once only, because this makes torch recompute the block
            saved = self._saved_output.grad_fn.saved_tensors
            self._tensors = [
                tensor.detach().requires_grad_(requires_grad)
                for tensor, requires_grad in zip(saved, self._requires_grad, strict=True)
            ]
            self._pieces = self._tensors[0].chunk(self._count, dim=1)
        inputs = self._gather_inputs(index, self._tensors)
        self._num_recomputed += 1
        if self._num_recomputed == self._count:
            self.release()
        with ExitStack() as stack:
            # torch disables its modes during the backward pass: enter the forward pass's modes again
            for mode in self._modes:
                stack.enter_context(mode)
            return self._method(self._block, *inputs)

    def _gather_inputs(self, index: int, tensors: Sequence[Tensor]) -> list[Any]:
        """Return the method's inputs for one piece, which takes the place of the first input."""
        inputs = list(self._non_tensor_inputs)
        for input_index, tensor in zip(self._tensor_indices, tensors, strict=True):
            inputs[input_index] = tensor
        inputs[0] = self._pieces[index]
        return inputs
