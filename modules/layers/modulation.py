"""Shift, scale and gate of adaptive norms (adaLN), with few passes over the tokens in uncompiled code.

torch's operators cast while they read and write, if they are let: on a GPU one kernel reads 16 bits, computes
in float32 and rounds the result to 16 bits. Casts as operators of their own, and those that autograd adds for
them, cost a pass each. So both functions write into a result of the wanted dtype, forward and backward, which
autograd does not allow by itself. Compiled code has plain operators, which the compiler merges.
"""
# Letters: B batch, L tokens, C width

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def modulate(normed: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return normed * (1 + scale) + shift, computed in the dtype of shift and scale and rounded to `dtype`.

    normed: B L C. shift, scale: B 1 C.
    """
    normed, factor = normed.to(scale.dtype), 1 + scale
    if torch.compiler.is_compiling():
        return torch.addcmul(shift, normed, factor).to(dtype)
    modulated: Tensor = _Modulate.apply(normed, shift, factor, dtype)
    return modulated


def add_gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """Return x + gate * branch, computed in the dtype of x, which must be the widest of the three.

    x, branch: B L C. gate: B 1 C. If the gate is not trained, autograd keeps nothing of the branch, and
    recomputing a checkpointed block ends before the last branch is added: see `_AddGated`.
    """
    gate = gate.to(x.dtype)
    if torch.compiler.is_compiling():
        return torch.addcmul(x, gate, branch.to(x.dtype))
    whole: Tensor = _AddGated.apply(x, gate, branch)
    return whole


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, normed: Tensor, shift: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(normed if ctx.needs_input_grad[2] else None, factor)
        ctx.shape = shift.shape
        return torch.addcmul(shift, normed, factor, out=torch.empty_like(normed, dtype=dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        normed, factor = ctx.saved_tensors
        for_normed, for_shift, for_factor, _ = ctx.needs_input_grad
        if for_shift or for_factor or factor.dtype != torch.float32:
            gradient = gradient.to(factor.dtype)  # sums over tokens in 16 bits would be too coarse
        return (
            gradient * factor if for_normed else None,
            gradient.sum_to_size(ctx.shape) if for_shift else None,
            (gradient * normed).sum_to_size(factor.shape) if for_factor else None,
            None,
        )


class _AddGated(torch.autograd.Function):
    """Holds the gate itself instead of saving it.

    A checkpoint recomputes up to the last saved tensor. A gate saved here, at the end of a block, would make
    it compute the last branch to its end, although no gradient depends on the result.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(branch)
        ctx.gate, ctx.dtype = gate.detach(), branch.dtype
        # with `out` also because autocast casts what a plain addcmul gets
        return torch.addcmul(x, gate, branch, out=torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        for_x, for_gate, for_branch = ctx.needs_input_grad
        of_gate = (gradient * ctx.saved_tensors[0]).sum_to_size(ctx.gate.shape) if for_gate else None
        of_branch = None
        if for_branch:
            of_branch = torch.empty_like(gradient, dtype=ctx.dtype)
            torch.mul(gradient, ctx.gate, out=of_branch)
        return gradient if for_x else None, of_gate, of_branch
