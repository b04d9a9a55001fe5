"""LoRA-GGPO: noise on the weights of a LoRA's layers during training, as strong as weights and gradients are.

Source: Chang et al. 2025, arXiv 2502.14538.
"""
# Letters: R rank

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modules.fp8.weights import dequantise, is_fp8, scale_of
from modules.private_torch import disable_dynamo

MOST_ROWS = 1000  # of a weight whose mean norm is estimated


@dataclass(frozen=True)
class Perturbation:
    """How strong the noise is."""

    sigma: float  # for each row of a weight: times its norm
    beta: float  # times the square of its gradient's norm


def row_strengths(
    down: Tensor, up: Tensor, gradients: tuple[Tensor, Tensor], scale: float, base: Tensor, rule: Perturbation
) -> Tensor:
    """Return the standard deviation of the noise in each row of a weight.

    It is (sigma * w + beta * g^2) / sqrt(out), with w = sqrt(base^2 + |row of up @ down|^2) and g = |row of
    scale * (up @ d_down + d_up @ down)|. Only products of the rank's width are computed.
    down: R x in. up: out x R. gradients: of both. base: the mean norm of the frozen weight's rows.
    """
    d_down, d_up = gradients
    weights = (base**2 + _row_squares(up, down)).sqrt()
    changes = scale**2 * _row_squares(torch.cat([up, d_up], 1), torch.cat([d_down, down]))
    return (rule.sigma * weights + rule.beta * changes) / math.sqrt(len(up))


def _row_squares(left: Tensor, right: Tensor) -> Tensor:
    """Return the squared norms of the rows of left @ right: out x R, R x in -> out."""
    return ((left @ (right @ right.T)) * left).sum(1).clamp(min=0)


@torch.no_grad()
def mean_row_norm(layer: nn.Linear, seed: int) -> Tensor:
    """Return the mean norm of up to MOST_ROWS rows of a frozen weight, chosen by the seed; float32, CPU."""
    weight = layer.weight
    rows = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))[:MOST_ROWS]
    chosen = dequantise(weight, scale_of(layer)) if is_fp8(weight.dtype) else weight
    chosen = chosen[rows.to(weight.device)]
    return torch.linalg.vector_norm(chosen, dim=1, dtype=torch.float32).mean().cpu()


class _Noise(torch.autograd.Function):
    """x @ P.T for a normal P that is made from a seed, again in the backward pass, rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, deviations: Tensor, seed: int) -> Tensor:
        ctx.save_for_backward(deviations)
        ctx.seed, ctx.width = seed, x.shape[-1]
        return x @ draw_noise(deviations, x.shape[-1], seed, x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (deviations,) = ctx.saved_tensors
        return gradient @ draw_noise(deviations, ctx.width, ctx.seed, gradient.dtype), None, None


def draw_noise(deviations: Tensor, width: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Return normal numbers, out x width, row i with the standard deviation `deviations[i]`."""
    generator = torch.Generator(deviations.device).manual_seed(seed)
    numbers = torch.randn(
        len(deviations), width, generator=generator, device=deviations.device, dtype=torch.float32
    )
    return numbers.mul_(deviations[:, None]).to(dtype)


# not torch.compiler.disable, which imports the compiler (two seconds) when this file is imported
@disable_dynamo
def perturbed(x: Tensor, deviations: Tensor, seed: int) -> Tensor:
    """Return what noise on a weight adds to a layer's output. x: ... in. deviations: out, one of each row.

    The noise is constant for gradients; those of x go through it.
    """
    added: Tensor = _Noise.apply(x, deviations.to(x.device), seed)
    return added


class RowStrengths(nn.Module):
    """The noise of every layer, by its name: buffers that are saved with the state of a training."""

    def __init__(self, heights: dict[str, int]) -> None:
        super().__init__()
        for name, rows in heights.items():
            self.register_buffer(name, torch.zeros(rows))
