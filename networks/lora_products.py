"""Compute LoRA layers: products summed in place, block-diagonal up factors, noise on weights (LoRA-GGPO).

As separate operations, a LoRA costs three passes over the output: its own output is written and read, and the
sum is written. The backward pass costs as many over the gradient of the input. Here, the matrix product
itself adds to the tensor (addmm), which is read and written once and rounded once. The up factor of a fused
layer is block-diagonal if its parts (q, k, v, ...) have their own LoRAs. Source of LoRA-GGPO: Chang et al.
2025, arXiv 2502.14538.
"""
# Letters: R rank (of each part if there are P parts), M rows of all samples

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from checkpoints.stored.forms import get_dequantized_weight
from modules.private_torch import disable_dynamo


def project_in_place_gradient(x: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x for the frozen layer, x @ down^T, ... x R).

    The frozen layer must be linear, and nothing else may use the first result, because its gradient is
    overwritten with the sum of both gradients.

    Args:
        x: Input, ... x in.
        down: Down factor, R x in, in the dtype of x.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x, functional.linear(x, down)
    frozen_input, hidden = _Branch.apply(x, down)
    return frozen_input, hidden


class _Branch(torch.autograd.Function):
    """Receives both gradients of x in one call, so that a product can be added to one of them in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, down)
        ctx.set_materialize_grads(False)
        return x.view_as(x), functional.linear(x, down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor | None, grad_hidden: Tensor | None) -> tuple[Tensor | None, ...]:
        x, down = ctx.saved_tensors
        if grad_hidden is None:
            return grad_x, None
        grad_hidden = flatten_rows(grad_hidden)
        grad_down = grad_hidden.t() @ flatten_rows(x) if ctx.needs_input_grad[1] else None
        if grad_x is None:
            return (grad_hidden @ down).view(x.shape), grad_down
        return add_product(grad_x, grad_hidden, down), grad_down


def save_for_add_up(hidden: Tensor, up: Tensor, split_sizes: Sequence[int] = ()) -> Tensor | None:
    """Save tensors for the backward pass of `add_up`; call it before the frozen layer, with equal arguments.

    Activation checkpointing recomputes a block up to its last saved tensor. If a LoRA's tensors are saved
    before its frozen layer runs, the product of the block's last layer is not recomputed.

    Returns:
        A placeholder with the shape of the output, which takes no memory and connects `add_up` to the saved
        tensors; None if no gradients are needed.
    """
    if not (torch.is_grad_enabled() and (hidden.requires_grad or up.requires_grad)):
        return None
    saved: Tensor = _SaveForAddUp.apply(hidden, up, tuple(split_sizes or up.shape[:1]))
    return saved


class _SaveForAddUp(torch.autograd.Function):
    """Autograd function for the backward pass of `add_up`; forward saves its inputs and returns a dummy."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, up: Tensor, split_sizes: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(hidden, up)
        ctx.split_sizes = split_sizes
        return hidden.new_empty(()).expand(*hidden.shape[:-1], up.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, up = ctx.saved_tensors
        # of each part: gradient of its output, its values of `hidden`, its rows of the up factor
        gradients = flatten_rows(gradient).split(ctx.split_sizes, -1)
        groups = flatten_rows(hidden).chunk(len(ctx.split_sizes), -1)
        blocks = up.split(ctx.split_sizes)
        grad_hidden = [part @ block for part, block in zip(gradients, blocks, strict=True)]
        grad_up = [part.t() @ group for part, group in zip(gradients, groups, strict=True)]
        return _join(grad_hidden, -1).view(hidden.shape), _join(grad_up, 0), None


def add_up(
    out: Tensor, hidden: Tensor, up: Tensor, split_sizes: Sequence[int], saved: Tensor | None
) -> Tensor:
    """Add hidden @ up^T to `out` in place and return it.

    Args:
        out: Output of a frozen layer, ... x out; nothing else may use it.
        hidden: Output of the down factor, ... x R.
        up: Up factor, out x R, in the dtype of `hidden`.
        split_sizes: Number of rows of each part of `up`; each part multiplies its own group of values of
            `hidden`. () for a single part.
        saved: Result of `save_for_add_up` for the same arguments.
    """
    split_sizes = tuple(split_sizes or up.shape[:1])  # a single part has all rows
    # without gradients, no autograd function is needed
    if saved is None and not (torch.is_grad_enabled() and out.requires_grad):
        return _add_parts(out, hidden, up, split_sizes)
    total: Tensor = _AddUp.apply(out, saved, hidden.detach(), up.detach(), split_sizes)
    return total


class _AddUp(torch.autograd.Function):
    """Adds to the first input in place, without marking it as changed (`ctx.mark_dirty`).

    Marking a view, as outputs of linear layers often are, would copy its gradient. If another operation has
    saved the input, its version counter still makes the backward pass raise an error.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, saved: Tensor | None, hidden: Tensor, up: Tensor, split_sizes: tuple[int, ...]
    ) -> Tensor:
        return _add_parts(out.detach(), hidden, up, split_sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, gradient, None, None, None


def _add_parts(out: Tensor, hidden: Tensor, up: Tensor, split_sizes: tuple[int, ...]) -> Tensor:
    """Add hidden @ up^T to `out` in place, part by part, without autograd; return `out`."""
    if len(split_sizes) == 1:
        return add_product(out, flatten_rows(hidden), up.t())
    outputs = out.view(-1, out.shape[-1]).split(split_sizes, -1)
    groups = flatten_rows(hidden).chunk(len(split_sizes), -1)
    for output, group, block in zip(outputs, groups, up.split(split_sizes), strict=True):
        output.addmm_(group, block.t())
    return out


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return total + left @ right, ... x C, in place of `total` if it is contiguous.

    Args:
        total: Tensor to add to, ... x C.
        left: Left matrix, M x K.
        right: Right matrix, K x C.
    """
    # in place, because without that, addmm first copies `total` to its result
    total = total.contiguous()
    total.view(-1, total.shape[-1]).addmm_(left, right)
    return total


def flatten_rows(x: Tensor) -> Tensor:
    """Return x with all leading axes flattened: ... C -> M C."""
    return x.reshape(-1, x.shape[-1])


def _join(tensors: Sequence[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), axis)


class BlockUp(nn.Module):
    """Block-diagonal up factor of P parts; part p maps the p-th group of R values to its output rows.

    `weight` contains only the blocks, out x R. State dicts and files have the full matrix, out x P R.
    """

    def __init__(self, rank: int, split_sizes: Sequence[int]) -> None:
        """Allocate uninitialized blocks, float32 on the CPU.

        Args:
            rank: Sum of the parts' ranks, P x R for P parts of rank R.
            split_sizes: Number of rows of each part.
        """
        super().__init__()
        self.split_sizes = tuple(split_sizes)
        self.weight = nn.Parameter(torch.empty(sum(split_sizes), rank // len(split_sizes)))
        self.register_state_dict_post_hook(_spread)
        self.register_load_state_dict_pre_hook(_gather)

    def forward(self, hidden: Tensor) -> Tensor:
        """Multiply values, ... x P R, by this module's blocks; return ... x out."""
        return self.multiply(hidden, self.weight)

    def multiply(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Multiply values, ... x P R, by the given blocks, out x R; return ... x out."""
        groups = hidden.chunk(len(self.split_sizes), -1)
        blocks = weight.split(self.split_sizes)
        return torch.cat([functional.linear(x, w) for x, w in zip(groups, blocks, strict=True)], -1)


def _spread(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Replace the blocks of an up factor in a state dict with the full matrix."""
    assert isinstance(module, BlockUp)
    state[f"{prefix}weight"] = torch.block_diag(*state[f"{prefix}weight"].split(module.split_sizes))


def _gather(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace the full matrix of an up factor in a state dict with only its blocks."""
    assert isinstance(module, BlockUp)
    weight = state.get(f"{prefix}weight")
    if weight is None:
        return
    blocks = diagonal_blocks(weight, module.split_sizes)
    if blocks is None:
        raise ValueError(f"{prefix}weight has values outside the blocks of its parts")
    state[f"{prefix}weight"] = torch.cat(blocks)


def count_fused_part_rows(num_parts: int, rows: int, columns: int) -> tuple[int, ...]:
    """Return the row count of each part of a fused layer: q, k, v, or q, k, v and the MLP's first layer.

    With 3 parts, queries have as many rows as the weight has columns, but at least a third of all rows (heads
    may be wider than their input). Keys and values, which may have fewer heads, share the remaining rows.
    With 4 parts, q, k and v each have as many rows as the weight has columns.

    Args:
        num_parts: Number of parts.
        rows: Number of rows of the layer's weight.
        columns: Number of columns of the layer's weight.

    Returns:
        The row counts; () if the sizes do not fit.
    """
    split_sizes: tuple[int, ...] = ()
    if num_parts == 3:
        queries = max(columns, rows // 3)
        remaining = rows - queries
        split_sizes = (queries, remaining // 2, remaining - remaining // 2)
    elif num_parts == 4:
        split_sizes = (columns, columns, columns, rows - 3 * columns)
    return split_sizes if split_sizes and min(split_sizes) > 0 else ()


def diagonal_blocks(up: Tensor, num_rows: Sequence[int]) -> list[Tensor] | None:
    """Return the blocks of a block-diagonal up factor; None if it has nonzero values outside the blocks.

    Args:
        up: Up factor, out x P R.
        num_rows: Number of rows of each of the P parts.
    """
    if up.ndim != 2 or sum(num_rows) != len(up) or up.shape[1] % len(num_rows):
        return None
    rank = up.shape[1] // len(num_rows)
    rows = up.split(list(num_rows))
    blocks = [part[:, index * rank : (index + 1) * rank] for index, part in enumerate(rows)]
    # equal counts mean that all values outside the blocks are 0
    nonzero_in_rows = sum(int(part.count_nonzero()) for part in rows)
    nonzero_in_blocks = sum(int(block.count_nonzero()) for block in blocks)
    return blocks if nonzero_in_rows == nonzero_in_blocks else None


MAX_ROWS = 1000  # maximum number of rows of a weight from which their mean norm is estimated


def row_strengths(
    factors: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    scale: float,
    base_norm: Tensor,
    sigma_and_beta: tuple[float, float],
) -> Tensor:
    """Return the standard deviation of LoRA-GGPO's noise for each row of a weight.

    It is (sigma * w + beta * g^2) / sqrt(out), with w = sqrt(base_norm^2 + |row of up @ down|^2) and g =
    |row of scale * (up @ d_down + d_up @ down)|. No matrix of the weight's size is computed.

    Args:
        factors: Down factor, R x in, and up factor, out x R.
        gradients: Gradients of both factors.
        scale: Scale of the LoRA.
        base_norm: Mean row norm of the frozen weight.
        sigma_and_beta: Multipliers of the norm and of the squared gradient.
    """
    down, up = factors
    d_down, d_up = gradients
    sigma, beta = sigma_and_beta
    weight_norms = (base_norm**2 + _sum_row_squares(up, down)).sqrt()
    # [up, d_up] @ [d_down; down] = up @ d_down + d_up @ down
    gradient_squares = scale**2 * _sum_row_squares(torch.cat([up, d_up], 1), torch.cat([d_down, down]))
    return (sigma * weight_norms + beta * gradient_squares) / math.sqrt(len(up))


def _sum_row_squares(left: Tensor, right: Tensor) -> Tensor:
    """Return the squared norm of each row of left @ right (out x R times R x in)."""
    return ((left @ (right @ right.T)) * left).sum(1).clamp(min=0)


@torch.no_grad()
def mean_row_norm(layer: nn.Linear, seed: int) -> Tensor:
    """Return the mean norm of up to MAX_ROWS rows of a frozen weight, sampled by seed; float32, CPU."""
    rows = torch.randperm(layer.out_features, generator=torch.Generator().manual_seed(seed))[:MAX_ROWS]
    chosen = get_dequantized_weight(layer, layer.weight)[rows.to(layer.weight.device)]
    return torch.linalg.vector_norm(chosen, dim=1, dtype=torch.float32).mean().cpu()


class _Noise(torch.autograd.Function):
    """Compute x @ noise^T; the backward pass draws the noise, out x in, again from its seed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, deviations: Tensor, seed: int) -> Tensor:
        ctx.save_for_backward(deviations)
        ctx.seed = seed
        ctx.width = x.shape[-1]
        return x @ draw_noise(deviations, x.shape[-1], seed, x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (deviations,) = ctx.saved_tensors
        return gradient @ draw_noise(deviations, ctx.width, ctx.seed, gradient.dtype), None, None


def draw_noise(deviations: Tensor, width: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Return normal noise, out x width, whose row i has the standard deviation `deviations[i]`."""
    generator = torch.Generator(deviations.device).manual_seed(seed)
    numbers = torch.randn(
        len(deviations), width, generator=generator, device=deviations.device, dtype=torch.float32
    )
    return numbers.mul_(deviations[:, None]).to(dtype)


# not torch.compiler.disable, which imports the compiler (two seconds) when this file is imported
@disable_dynamo
def perturbed(x: Tensor, deviations: Tensor, seed: int) -> Tensor:
    """Return what random noise on a layer's weight adds to the output, ... x out.

    Gradients flow to x; the noise is a constant.

    Args:
        x: Input, ... x in.
        deviations: Standard deviation of the noise in each row of the weight, out.
        seed: Seed of the noise.
    """
    added: Tensor = _Noise.apply(x, deviations.to(x.device), seed)
    return added
