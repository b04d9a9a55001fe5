"""Shift, scale and gate of adaptive norms (adaLN), with few passes over the tokens in uncompiled code.

torch's operators can cast while they read and write: on a GPU one kernel reads 16 bits, computes in float32
and rounds the result to 16 bits. Separate casts, and those that autograd adds for them, cost
a pass each. So both functions write into a result of the wanted dtype, forward and backward, which autograd
does not allow by itself. Compiled code has plain operators, which the compiler merges.

The tokens may form segments with a row of shift, scale and gate each: rows are B S C. With two segments,
`split` is where the second one begins, as in a slice: from the end if negative. With several it has the
places where all but the first begin, from the front and rising. If rows alternate, it is a tensor, B L, with
the row of each token.
"""
# Letters: B batch, L tokens, S segments of them, C width

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Split = int | tuple[int, ...] | Tensor


def modulate(
    normed: Tensor, shift: Tensor | None, scale: Tensor | None, dtype: torch.dtype, split: Split = 0
) -> Tensor:
    """Return normed * (1 + scale) + shift, computed in the dtype of scale and rounded to `dtype`.

    Compiled code gets plain operators, which the compiler fuses. Eager code calls an autograd function that
    needs one kernel for computation and cast.

    Args:
        normed: Normed tokens, B L C.
        shift: B S C, a row for each of S segments of tokens; None means 0.
        scale: Like `shift`; None leaves `normed` unmodulated, without a shift too.
        dtype: Dtype of the result.
        split: Where the segments begin: one index, several, or the index of the row of each token.
    """
    if scale is None:
        return normed.to(dtype)
    factor = 1 + scale
    if shift is not None:
        normed = normed.to(scale.dtype)
    if torch.compiler.is_compiling():
        factor = _expand_to_tokens(factor, normed, split)
        if shift is None:
            return (normed.to(scale.dtype) * factor).to(dtype)
        return torch.addcmul(_expand_to_tokens(shift, normed, split), normed, factor).to(dtype)
    modulated: Tensor = _Modulate.apply(normed, shift, factor, dtype, split)
    return modulated


def add_gated(x: Tensor, gate: Tensor | None, branch: Tensor, split: Split = 0) -> Tensor:
    """Return x + gate * branch, computed in the dtype of x, which must be the widest of the three.

    `x` and `branch` are B L C. `gate` is B S C; None means 1. If the gate is not trained, autograd saves
    nothing of the branch, and recomputing a checkpointed block stops before the last branch is added.
    """
    if gate is None:
        return x + branch.to(x.dtype)
    gate = gate.to(x.dtype)
    if torch.compiler.is_compiling():
        return torch.addcmul(x, _expand_to_tokens(gate, x, split), branch.to(x.dtype))
    output: Tensor = _AddGated.apply(x, gate, branch, split)
    return output


def split_segments(split: Split, modulation: Sequence[Tensor], *tokens: Tensor) -> list[tuple[Tensor, ...]]:
    """Split tokens into segments of equal modulation.

    Args:
        split: Where the segments begin: one index, several, or the index of the modulation row of each token.
        modulation: Tensors of shift, scale or gate, each B S C with a row for each of S segments.
        *tokens: Token tensors, each B L C.

    Returns:
        For each segment its part of each token tensor, B L' C, followed by its row of each modulation tensor,
        B 1 C. If `split` has the row of each token, all tokens are one segment, with rows B L C.
    """
    num_segments = modulation[0].shape[1]
    if num_segments == 1:
        return [(*tokens, *modulation)]
    if isinstance(split, Tensor):
        token_modulation = [tensor.gather(1, expand_indices(split, tensor)) for tensor in modulation]
        return [(*tokens, *token_modulation)]
    starts = (split,) if isinstance(split, int) else split
    assert len(starts) == num_segments - 1, f"{num_segments} rows for the segments that begin at {starts}"
    segments = []
    for index, (start, stop) in enumerate(pairwise((None, *starts, None))):
        segment_tokens = [tensor[:, start:stop] for tensor in tokens]
        segment_modulation = [tensor[:, index : index + 1] for tensor in modulation]
        segments.append((*segment_tokens, *segment_modulation))
    return segments


def _expand_to_tokens(modulation: Tensor, tokens: Tensor, split: Split) -> Tensor:
    """Repeat each segment's modulation row for its tokens: B L C, or B 1 C if all tokens share one row."""
    parts = split_segments(split, [modulation], tokens)
    if len(parts) == 1:
        return parts[0][1]
    return torch.cat([row.expand_as(part) for part, row in parts], dim=1)


def expand_indices(indices: Tensor, modulation: Tensor) -> Tensor:
    """Repeat the row index of each token, B L, over the channels of the modulation: B L C."""
    return indices.unsqueeze(2).expand(-1, -1, modulation.shape[2])


def _sum_segments(gradients: Tensor, modulation: Tensor, split: Split) -> Tensor:
    """Sum the gradients of all tokens, B L C, over the tokens of each segment: gradients of the rows."""
    if modulation.shape[1] == 1:
        return gradients.sum_to_size(modulation.shape)
    if isinstance(split, Tensor):
        return torch.zeros_like(modulation, dtype=gradients.dtype).scatter_add(
            1, expand_indices(split, modulation), gradients
        )
    parts = split_segments(split, [modulation], gradients)
    return torch.cat([part.sum_to_size(row.shape) for part, row in parts], dim=1)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, normed: Tensor, shift: Tensor | None, factor: Tensor, dtype: torch.dtype, split: Split
    ) -> Tensor:
        ctx.save_for_backward(normed if ctx.needs_input_grad[2] else None, factor)
        ctx.dtype, ctx.split = normed.dtype, split
        modulated = torch.empty_like(normed, dtype=dtype)
        if shift is None:
            for segment, output, scale in split_segments(split, [factor], normed, modulated):
                torch.mul(segment, scale, out=output)
        else:
            for segment, output, offset, scale in split_segments(split, [shift, factor], normed, modulated):
                torch.addcmul(offset, segment, scale, out=output)
        return modulated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the normalized input, the shift and the factor, then None twice."""
        normed, factor = ctx.saved_tensors
        needs_normed, needs_shift, needs_factor, *_ = ctx.needs_input_grad
        if needs_shift or needs_factor or factor.dtype != torch.float32:
            gradient = gradient.to(factor.dtype)  # sums over tokens in 16 bits would be too coarse
        normed_gradient = shift_gradient = factor_gradient = None
        if needs_normed:
            normed_gradient = torch.empty_like(gradient, dtype=ctx.dtype)
            for segment, output, scale in split_segments(ctx.split, [factor], gradient, normed_gradient):
                torch.mul(segment, scale, out=output)
        if needs_shift:
            shift_gradient = _sum_segments(gradient, factor, ctx.split)
        if needs_factor:
            factor_gradient = _sum_segments(gradient * normed, factor, ctx.split)
        # in the order of the arguments of `forward`; dtype and split have no gradient
        return normed_gradient, shift_gradient, factor_gradient, None, None


class _AddGated(torch.autograd.Function):
    """Adds a gated branch; keeps the gate as an attribute instead of saving it for the backward pass.

    Activation checkpointing recomputes a block up to its last saved tensor. If the gate at the end of a block
    were saved, the last branch would be computed to its end, although no gradient depends on its result.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, branch: Tensor, split: Split) -> Tensor:
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(branch)
        ctx.gate = gate.detach()
        ctx.dtype = branch.dtype
        ctx.split = split
        output = torch.empty_like(x)
        for segment, added, target, scale in split_segments(split, [gate], x, branch, output):
            # with `out` also because autocast would cast the inputs of a plain addcmul
            torch.addcmul(segment, scale, added, out=target)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        for_x, for_gate, for_branch, _ = ctx.needs_input_grad
        grad_gate = _sum_segments(gradient * ctx.saved_tensors[0], ctx.gate, ctx.split) if for_gate else None
        grad_branch = None
        if for_branch:
            grad_branch = torch.empty_like(gradient, dtype=ctx.dtype)
            for segment, output, scale in split_segments(ctx.split, [ctx.gate], gradient, grad_branch):
                torch.mul(segment, scale, out=output)
        return gradient if for_x else None, grad_gate, grad_branch, None
