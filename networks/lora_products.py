"""The two thin products of a LoRA, computed into tensors that the frozen layer writes anyway.

As separate operations a LoRA costs three passes over the output (its own output written and read, the sum
written) and in the backward pass as many over the input's gradient. Here both sums are made by the matrix
product itself, which reads and writes the tensor once. They are rounded once, not twice.
"""
# Letters: R rank

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.autograd.function import once_differentiable


def branch(x: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return x for a frozen layer, and x @ down^T, ... R.

    x: ... in. down: R x in, in the dtype of x. The frozen layer must be linear and must be the only one to
    use the first result: the input gradient that it computes becomes the sum of both, in place.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x, functional.linear(x, down)
    seen, hidden = _Branch.apply(x, down)
    return seen, hidden


class _Branch(torch.autograd.Function):
    """Receives the gradients of both ways in one call, and so can add one to the other in a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, down)
        ctx.set_materialize_grads(False)
        return x.view_as(x), functional.linear(x, down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_x: Tensor | None, of_hidden: Tensor | None) -> tuple[Tensor | None, ...]:
        x, down = ctx.saved_tensors
        if of_hidden is None:
            return of_x, None
        of_hidden = _flat(of_hidden)
        of_down = of_hidden.t() @ _flat(x) if ctx.needs_input_grad[1] else None
        if of_x is None:
            return (of_hidden @ down).view(x.shape), of_down
        return add_product(of_x, of_hidden, down), of_down


def hold(hidden: Tensor, up: Tensor, heights: Sequence[int] = ()) -> Tensor | None:
    """Save what the backward pass of `add_up` needs. Call before the frozen layer; arguments as there.

    A checkpoint recomputes up to the last saved tensor. With all of a LoRA's saved before its frozen layer
    computes, recomputing a block does not repeat the product with the weight of its last layer.
    Returns a tensor of the output's shape that takes no memory; None without gradients.
    """
    if not (torch.is_grad_enabled() and (hidden.requires_grad or up.requires_grad)):
        return None
    held: Tensor = _Hold.apply(hidden, up, tuple(heights or up.shape[:1]))
    return held


class _Hold(torch.autograd.Function):
    """Receives the gradient of the output by way of `_AddUp`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, up: Tensor, heights: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(hidden, up)
        ctx.heights = heights
        return hidden.new_empty(()).expand(*hidden.shape[:-1], up.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, up = ctx.saved_tensors
        rows, groups = _flat(gradient).split(ctx.heights, -1), _flat(hidden).chunk(len(ctx.heights), -1)
        of_hidden = [row @ block for row, block in zip(rows, up.split(ctx.heights), strict=True)]
        of_up = [row.t() @ group for row, group in zip(rows, groups, strict=True)]
        return _join(of_hidden, -1).view(hidden.shape), _join(of_up, 0), None


def add_up(out: Tensor, hidden: Tensor, up: Tensor, heights: Sequence[int], held: Tensor | None) -> Tensor:
    """Return out + hidden @ up^T, in the memory of `out`.

    out: ... out, of a frozen layer; nothing else may use it. hidden: ... R and up: out x R, in its dtype.
    heights: rows of each of several parts of `up`; each multiplies its own group of values of `hidden`, which
    are as many as `up` is wide. held: of `hold` for the same arguments.
    """
    heights = tuple(heights or up.shape[:1])
    if held is None and not (torch.is_grad_enabled() and out.requires_grad):
        return _add_parts(out, hidden, up, heights)
    whole: Tensor = _AddUp.apply(out, held, hidden.detach(), up.detach(), heights)
    return whole


class _AddUp(torch.autograd.Function):
    """Changes the memory of its first input, and tells autograd by the version of that tensor.

    Marking the input as changed would cost a copy of its gradient if the input is a view, as outputs of
    linear layers often are. If another operation had saved it, the backward pass would raise an error.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, held: Tensor | None, hidden: Tensor, up: Tensor, heights: tuple[int, ...]
    ) -> Tensor:
        return _add_parts(out.detach(), hidden, up, heights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, gradient, None, None, None


def _add_parts(out: Tensor, hidden: Tensor, up: Tensor, heights: tuple[int, ...]) -> Tensor:
    """Do what `add_up` does, without gradients."""
    if len(heights) == 1:
        return add_product(out, _flat(hidden), up.t())
    rows, groups = out.view(-1, out.shape[-1]).split(heights, -1), _flat(hidden).chunk(len(heights), -1)
    for row, group, block in zip(rows, groups, up.split(heights), strict=True):
        row.addmm_(group, block.t())
    return out


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return total + left @ right, in the memory of `total` if that is contiguous.

    total: ... C. left: M K. right: K C.
    """
    # in place, because torch begins a product with a result of its own by copying `total` there
    total = total.contiguous()
    total.view(-1, total.shape[-1]).addmm_(left, right)
    return total


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _join(tensors: Sequence[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), axis)
