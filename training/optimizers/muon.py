"""Muon for the matrices of a network, AdamW for all its other weights.

A step of Muon is the orthogonalized momentum of a matrix: all its singular values become about 1. A weight
that consists of several matrices (queries, keys and values; gate and value) is stepped as if each were a
separate weight. Source: Jordan 2024, "Muon"; Liu et al. 2025, arXiv 2502.16982. Arguments are those of
`torch.optim.Muon`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from protocols.family import DitSpec
from training.trainable import Trainable

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz steps, by Jordan
NUM_STEPS = 5
EPS = 1e-7
BETAS, ADAM_EPS = (0.9, 0.95), 1e-8  # settings of AdamW, as in KohakuMossTrainer
MATCH_RMS_ADAMW = "match_rms_adamw"  # value of adjust_lr_fn
ADJUSTMENTS = (None, "original", MATCH_RMS_ADAMW)
NUM_MATRICES = (
    "matrices"  # key of a parameter group: number of matrices in each weight; 0: AdamW steps the weights
)


class MuonWithAdam(Optimizer):
    """Muon for two-dimensional weights; AdamW for all others and for groups whose NUM_MATRICES is 0."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] = COEFFICIENTS,
        eps: float = EPS,
        ns_steps: int = NUM_STEPS,
        adjust_lr_fn: str | None = None,
    ) -> None:
        """Create the optimizer, with the arguments and defaults of `torch.optim.Muon`.

        Raises:
            ValueError: If an argument is invalid.
        """
        if adjust_lr_fn not in ADJUSTMENTS:
            raise ValueError(f"adjust_lr_fn {adjust_lr_fn}: pass original or {MATCH_RMS_ADAMW}")
        if len(ns_coefficients) != 3 or not 0 < ns_steps < 100 or not 0 <= momentum <= 1:
            raise ValueError("three ns_coefficients, 1 to 99 ns_steps and a momentum from 0 to 1 are needed")
        settings = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": tuple(ns_coefficients),
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            NUM_MATRICES: 1,  # number of matrices in a weight; groups of fused weights set their own
        }
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss
        """Update all weights that have gradients. A closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                if weight.ndim == 2 and group[NUM_MATRICES]:
                    self._step_with_muon(weight, weight.grad, group)
                else:
                    self._step_with_adamw(weight, weight.grad, group)

    def _step_with_muon(self, weight: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        matrices = weight.chunk(group[NUM_MATRICES])
        updates = update.chunk(group[NUM_MATRICES])
        for matrix, matrix_update in zip(matrices, updates, strict=True):
            direction = orthogonalize(
                matrix_update, group["ns_coefficients"], group["ns_steps"], group["eps"]
            )
            rate = group["lr"] * _learning_rate_factor(group["adjust_lr_fn"], *matrix_update.shape)
            matrix.add_(direction, alpha=-rate)

    def _step_with_adamw(self, weight: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        """Step a weight with AdamW: for vectors, and for matrices outside the transformer blocks."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        state["step"] += 1
        first, second = BETAS
        steps = int(state["step"])
        mean = state["exp_avg"].lerp_(gradient, 1 - first) / (1 - first**steps)
        square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - second) / (1 - second**steps)
        weight.add_(mean / (square.sqrt() + ADAM_EPS), alpha=-group["lr"])


def _learning_rate_factor(adjustment: str | None, rows: int, columns: int) -> float:
    """Return the multiplier of a matrix's learning rate, which depends on the shape of the matrix."""
    if adjustment == MATCH_RMS_ADAMW:
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def orthogonalize(
    matrix: Tensor, coefficients: Sequence[float] = COEFFICIENTS, steps: int = NUM_STEPS, eps: float = EPS
) -> Tensor:
    """Return approximately the nearest orthogonal matrix by Newton-Schulz steps: singular values near 1."""
    first, second, third = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix) / (matrix.norm() + eps)
    x = x.bfloat16()
    for _ in range(steps):
        product = x @ x.T
        x = first * x + (third * (product @ product) + second * product) @ x
    return (x.T if is_tall else x).to(matrix.dtype)


def arrange_groups(trainable: Trainable, spec: DitSpec) -> Trainable:
    """Group the trained weights of a full network by the algorithm that updates them.

    Muon updates the matrices in blocks, grouped by the number of matrices fused in a weight
    (`DitSpec.num_fused_matrices`). AdamW updates all other weights without weight decay: norms, biases,
    embedding layers and output layers.
    """
    names = trainable.names
    block_prefixes = tuple(f"{name}." for name in (*spec.block_lists, *spec.further_blocks))
    groups: list[dict[str, Any]] = []
    group_names: list[str] = []
    for group, group_name in zip(trainable.groups, trainable.group_names, strict=True):
        weights_by_count: dict[int, list[Tensor]] = {}  # a fused qkv weight counts as 3 matrices
        for weight in group["params"]:
            name = names[weight].partition(".")[2]  # without the network name in front
            is_matrix_in_block = weight.ndim == 2 and name.startswith(block_prefixes)
            num_matrices = spec.count_matrices(name) if is_matrix_in_block else 0  # 0: AdamW steps it
            weights_by_count.setdefault(num_matrices, []).append(weight)
        for num_matrices, weights in sorted(weights_by_count.items(), reverse=True):
            decay = {} if num_matrices else {"weight_decay": 0.0}
            groups.append({**group, "params": weights, NUM_MATRICES: num_matrices, **decay})
            description = f"{num_matrices} matrices each" if num_matrices > 1 else "matrices"
            group_names.append(f"{group_name} {description if num_matrices else 'AdamW'}")
    return replace(trainable, groups=groups, group_names=tuple(group_names))
