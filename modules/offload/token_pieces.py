"""What a block does to each token by itself, computed for a few thousand tokens at a time: less memory at
once.

A feed-forward widens every token several times. In the backward pass of a checkpointed block that is most of
what is alive, and it is needed for one piece of the tokens after another. So each piece is a checkpoint of
its own. A checkpoint inside another usually costs a third computation: block, then pieces. Here it does not:
the pieces keep nothing but what all of them are computed of, kept once and before the first. There torch
stops to compute a block again (its early stop), and goes on piece by piece.
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

# enough for a GPU to be busy, and for the weights, which are read (and taken out of fp8) for every piece
TOKENS = 4096
# a layer on which this is set and true is not computed in pieces, nor is its block
WHOLE = "sees_whole_input"

Method = Callable[..., Tensor]


def compute_in_pieces(dit: nn.Module, spec: DitSpec, tokens: int = TOKENS) -> None:
    """Have the blocks compute `spec.token_wise`, their methods (x: B L C, ...) -> B L C', for at most that
    many tokens at a time.

    Takes effect in train mode with gradients on. For after LoRA, before compilation and `checkpoint_blocks`.
    Results are the same but for the order in which products sum up. Blocks with a layer that asks for
    `sees_whole_input` stay as they are.
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
        # compiled code computes what it has to, and keeps what it needs, by its own plan
        if torch.compiler.is_compiling():

            def whole(piece: Tensor) -> Tensor:
                return method(block, piece, *others)

            return torch.cat(
                [checkpoint(whole, piece, use_reentrant=False) for piece in x.chunk(count, dim=1)], dim=1
            )
        given = _Given(method, block, count, x, others)
        # in a tuple, so that it tells checkpointing the device and is not kept, which would be after a piece
        # was computed
        device = (x.new_empty(0),)
        computed = [checkpoint(given.compute, index, device, use_reentrant=False) for index in range(count)]
        given.forget()
        return torch.cat(computed, dim=1)

    return run


class _Keep(torch.autograd.Function):
    """Makes a node that keeps tensors, as everything that autograd keeps; no gradient goes through it."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise AssertionError("only keeps")


class _Given:
    """What all pieces of one call are computed of: at first as it is given, in the backward pass as autograd
    kept it.
    """

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
        self._pieces = x.chunk(count, dim=1)  # cut once: the gradients of the pieces are put together once
        self._done = 0  # pieces that were computed again

    def forget(self) -> None:
        """All pieces are computed: nothing is held until the backward pass."""
        self._tensors, self._pieces, self._done = None, (), 0

    def compute(self, index: int, device: object) -> Tensor:
        """One piece; in the backward pass each comes once."""
        is_again = self._tensors is None or self._done > 0
        if self._tensors is None:
            # may be read once: it has the block computed again
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
