"""The products of a LoHa's factors, and its trained layer; the part of `loha.py` that imports torch."""
# Letters: r rank; B images, H W their size

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from networks.factored_layer import Geometry, Product, product_with_core, shape_with_core
from networks.kinds.algebra import Algebra, MismatchError
from networks.kinds.factors import Factors, Shapes

# (left factor, right factor, core) of each matrix
MATRICES = (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2"))


class LohaAlgebra(Algebra):
    """Element-wise (w1_a w1_b) * (w2_a w2_b); if there is a core, left factors are stored r x out."""

    def find_error(self, factors: Factors) -> str | None:
        """Return an error message if the second low-rank product is missing; otherwise None."""
        return "it has hada_w1_a but no hada_w2_a" if "hada_w2_a" not in factors else None

    def shape(self, shapes: Shapes) -> tuple[int, ...] | None:
        """Return the shape of the two low-rank products; raise MismatchError if their shapes differ."""
        if "hada_w1_a" not in shapes:
            return None
        first, second = (
            shape_with_core(shapes[left], shapes[right], shapes.get(core)) for left, right, core in MATRICES
        )
        if first != second:
            raise MismatchError(f"its matrices are {list(first)} and {list(second)}")
        return first

    def compute_change(self, factors: Factors, scale: float) -> Tensor | None:
        """Return the element-wise product of the two low-rank matrices, which is the change of the weight."""
        if "hada_w1_a" not in factors:
            return None
        first = product_with_core(factors["hada_w1_a"] * scale, factors["hada_w1_b"], factors.get("hada_t1"))
        second = product_with_core(factors["hada_w2_a"], factors["hada_w2_b"], factors.get("hada_t2"))
        return first.mul_(second)

    def find_factors_with_rows(self, factors: Factors) -> set[str] | None:
        """Return the left factors; None if there is a core, because rows are then their second axis."""
        if any(core in factors for _, _, core in MATRICES):
            return None
        return factors.keys() & {"hada_w1_a", "hada_w2_a"}

    def select_rows(self, factors: Factors, rows: slice | Tensor) -> Factors | None:
        """Return some rows of the left factors; with a core, these rows are on axis 1."""
        selected: dict[str, Tensor] = {}
        for left, _, core in MATRICES:
            if left in factors:
                selected[left] = factors[left][:, rows] if core in factors else factors[left][rows]
        return selected


def _matrices(factors: Mapping[str, Tensor], strength: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return w1_a, w1_b, w2_a and w2_b in a dtype, with w1_a multiplied by the strength."""
    w1_a = (factors["hada_w1_a"] * strength).to(dtype)
    return w1_a, *(factors[name].to(dtype) for name in ("hada_w1_b", "hada_w2_a", "hada_w2_b"))


def add_loha(x: Tensor, factors: Mapping[str, Tensor], strength: float) -> Tensor:
    """Return x @ ((w1_a w1_b) * (w2_a w2_b))^T, the LoHa's addition to the layer's output.

    Args:
        x: Input, ... x in.
        factors: Factors of the module, by name (`hada_w1_a`, ...).
        strength: Multiplier of the change.

    Returns:
        The addition, ... x out.
    """
    matrices = _matrices(factors, strength, x.dtype)
    result: Tensor = _HadamardLinear.apply(x, *matrices)
    return result


class _HadamardLinear(torch.autograd.Function):
    """Linear layer with a LoHa, whose backward pass recomputes the matrices from the factors.

    This saves the memory of three matrices of the weight's size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w1_a, w1_b, w2_a, w2_b)
        return functional.linear(x, (w1_a @ w1_b).mul_(w2_a @ w2_b))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, w1_a, w1_b, w2_a, w2_b = ctx.saved_tensors
        first = w1_a @ w1_b  # out in
        second = w2_a @ w2_b
        grad_x = gradient @ (first * second) if ctx.needs_input_grad[0] else None
        grad_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)  # out in
        grad_first = grad_weight * second
        grad_second = grad_weight * first
        return grad_x, grad_first @ w1_b.T, w1_a.T @ grad_first, grad_second @ w2_b.T, w2_a.T @ grad_second


def convolve_loha(x: Tensor, factors: Mapping[str, Tensor], strength: float, geometry: Geometry) -> Tensor:
    """Return the convolution of x with (w1_a w1_b) * (w2_a w2_b), the LoHa's addition to the output.

    Args:
        x: Input, B x in x H x W.
        factors: Factors of the module, by name (`hada_w1_a`, ...).
        strength: Multiplier of the change.
        geometry: Geometry of the convolution.

    Returns:
        B x out x H' x W'.
    """
    matrices = _matrices(factors, strength, x.dtype)
    result: Tensor = _HadamardConvolution.apply(geometry, x, *matrices)
    return result


class _HadamardConvolution(torch.autograd.Function):
    """Convolution with a LoHa; the backward pass recomputes the matrices from the factors."""

    @staticmethod
    def forward(
        ctx: Any, geometry: Geometry, x: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor
    ) -> Tensor:
        ctx.geometry = geometry
        ctx.save_for_backward(x, w1_a, w1_b, w2_a, w2_b)
        return geometry.convolve(x, (w1_a @ w1_b).mul_(w2_a @ w2_b))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, w1_a, w1_b, w2_a, w2_b = ctx.saved_tensors
        first = w1_a @ w1_b  # out in*kernel
        second = w2_a @ w2_b
        grad_x, grad_weight = ctx.geometry.gradients(x, first * second, gradient, ctx.needs_input_grad[1])
        grad_first = grad_weight * second
        grad_second = grad_weight * first
        w1_grads = grad_first @ w1_b.T, w1_a.T @ grad_first
        w2_grads = grad_second @ w2_b.T, w2_a.T @ grad_second
        return None, grad_x, *w1_grads, *w2_grads  # None for `geometry`


def _norm(factors: Mapping[str, Tensor]) -> Tensor:
    first = factors["hada_w1_a"] @ factors["hada_w1_b"]
    second = factors["hada_w2_a"] @ factors["hada_w2_b"]
    return torch.linalg.vector_norm(first * second)


def _initialize(name: str, weight: nn.Parameter) -> None:
    if name == "hada_w2_a":  # one factor is zero, so that the change is zero at first
        nn.init.zeros_(weight)
    else:
        nn.init.normal_(weight, std=0.1 if name == "hada_w1_a" else 1.0)  # as in LyCORIS


def _is_scaled(shapes: Shapes) -> bool:
    return True


PRODUCT = Product(
    kind="LoHa",
    add=add_loha,
    convolve=convolve_loha,
    norm=_norm,
    initialize=_initialize,
    is_scaled=_is_scaled,
)
