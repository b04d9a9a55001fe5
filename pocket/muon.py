"""Muon: orthogonalised momentum for matrices, Adam for vectors. On small networks much faster than Adam.

Source: Jordan 2024, "Muon"; the scale of an update follows Liu et al. 2025 (arXiv 2502.16982), so that
learning rates compare with Adam's.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from training.optimizers.muon import orthogonalize

MOMENTUM = 0.95
BETAS = (0.9, 0.98)


class Muon(Optimizer):
    """Optimize matrices with Muon's orthogonalized momentum, and vectors with Adam.

    A parameter of more than two axes is a matrix of its first axis by all others. A parameter whose first
    axis has length 1 counts as a vector.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss
        """Update all parameters that have a gradient. `closure` is not supported and must be None."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._matrix if parameter.ndim > 1 and parameter.shape[0] > 1 else self._vector
                    parameter.add_(update(parameter, parameter.grad), alpha=-group["lr"])

    def _matrix(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        direction = orthogonalize(gradient.lerp(momentum, MOMENTUM).flatten(1))
        # root mean square 0.2, like Adam's
        return direction.view_as(parameter) * (0.2 * max(direction.shape) ** 0.5)

    def _vector(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        mean = state["mean"].lerp_(gradient, 1 - BETAS[0]) / (1 - BETAS[0] ** state["step"])
        square = state["square"].lerp_(gradient.square(), 1 - BETAS[1]) / (1 - BETAS[1] ** state["step"])
        return mean / (square.sqrt() + 1e-8)
