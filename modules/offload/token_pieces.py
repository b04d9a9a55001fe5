"""Compute a block's token-wise layers for a few thousand tokens at a time, to save memory.

A feed-forward layer widens every token several times. In the backward pass of a checkpointed block that is
most of the live memory, although it is needed for one piece of the tokens at a time. So each piece is a
checkpoint of its own. A nested checkpoint usually costs a third computation: the block, then the pieces. Here
it does not: the pieces keep only their common inputs, which are saved once, before the first piece. At that
point torch stops recomputing the block (its early stop), and continues piece by piece.
"""
# Letters: B batch, L tokens, C width

import types
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.contract.family import DitSpec

# enough to keep a GPU busy, and to make up for reading (and dequantising) the weights for every piece
TOKENS = 4096
# attribute of a layer: if it is true, the layer's block is not computed in pieces
WHOLE = "sees_whole_input"

Method = Callable[..., Tensor]


def compute_in_pieces(dit: nn.Module, spec: DitSpec, tokens: int = TOKENS) -> None:
    """Make blocks compute their methods `spec.token_wise` for at most `tokens` tokens at a time.

    These methods map (x: B L C, ...) to B L C'. Has an effect in train mode with gradients on only. Call
    after LoRA, before compilation and `checkpoint_blocks`. Results differ only by the order of summation in
    products. Blocks with a layer that sets `sees_whole_input` are not changed.
    """
    # one function for all blocks of a class: compiled code knows functions by identity
    changed: dict[Method, Method] = {}
    for block in chain.from_iterable(spec.blocks(dit).values()):
        if any(getattr(layer, WHOLE, False) for layer in block.modules()):
            continue
        for name in spec.token_wise:
            method = getattr(type(block), name, None)
            if method is not None:
                changed.setdefault(method, _in_pieces(method, tokens))
                setattr(block, name, types.MethodType(changed[method], block))


def _in_pieces(method: Method, tokens: int) -> Method:
    def run(block: nn.Module, x: Tensor, *others: Any) -> Tensor:
        count = -(-x.shape[1] // tokens)
        if count == 1 or not (block.training and torch.is_grad_enabled()):
            return method(block, x, *others)
        # compiled code plans by itself what to keep and what to recompute
        if torch.compiler.is_compiling():

            def whole(piece: Tensor) -> Tensor:
                return method(block, piece, *others)

            return torch.cat(
                [checkpoint(whole, piece, use_reentrant=False) for piece in x.chunk(count, dim=1)], dim=1
            )
        given = _Given(method, block, count, x, others)
        # tells checkpointing the device; in a tuple, so that it is not saved, as that would happen after a
        # piece was computed
        device = (x.new_empty(0),)
        computed = [checkpoint(given.compute, index, device, use_reentrant=False) for index in range(count)]
        given.forget()
        return torch.cat(computed, dim=1)

    return run


class _Keep(torch.autograd.Function):
    """Saves tensors in a node of the autograd graph; no gradient flows through it."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise AssertionError("this node only saves tensors")


class _Given:
    """Common inputs of all pieces of a call: first those given, in the backward pass those autograd saved."""

    def __init__(
        self, method: Method, block: nn.Module, count: int, x: Tensor, others: tuple[Any, ...]
    ) -> None:
        self._method, self._block, self._count = method, block, count
        inputs = (x, *others)
        self._fixed = [None if isinstance(value, Tensor) else value for value in inputs]
        self._places = [index for index, value in enumerate(inputs) if isinstance(value, Tensor)]
        tensors = [inputs[index] for index in self._places]
        self._learns = [tensor.requires_grad for tensor in tensors]
        self._node: Any = _Keep.apply(torch.empty(0, requires_grad=True), *tensors).grad_fn
        self._tensors: list[Tensor] | None = tensors
        self._pieces = x.chunk(count, dim=1)  # split once, so that the pieces' gradients are joined once
        self._done = 0  # recomputed pieces

    def forget(self) -> None:
        """Release everything until the backward pass: all pieces are computed."""
        self._tensors, self._pieces, self._done = None, (), 0

    def compute(self, index: int, device: object) -> Tensor:
        """Compute one piece; the backward pass recomputes each once."""
        is_again = self._tensors is None or self._done > 0
        if self._tensors is None:
            # read only once: this makes torch recompute the block
            kept = zip(self._node.saved_tensors, self._learns, strict=True)
            self._tensors = [tensor.detach().requires_grad_(learns) for tensor, learns in kept]
            self._pieces = self._tensors[0].chunk(self._count, dim=1)
        inputs = list(self._fixed)
        for place, tensor in zip(self._places, self._tensors, strict=True):
            inputs[place] = tensor
        inputs[0] = self._pieces[index]
        if is_again:
            self._done += 1
            if self._done == self._count:
                self.forget()
        return self._method(self._block, *inputs)
