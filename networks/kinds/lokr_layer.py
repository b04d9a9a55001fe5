"""The products of a LoKr's factors, and its trained layer; the part of `lokr.py` that imports torch."""
# Letters: out = l * k and in = m * n: w1 is l x m, w2 is k x n; B images, H W their size

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from networks.factored_layer import Geometry, Product, product_with_core, shape_with_core
from networks.kinds.algebra import Algebra, MismatchError
from networks.kinds.factors import Factors, Shapes

_FIRST = ("lokr_w1", "lokr_w1_a")  # the small matrix, or its left factor


class LokrAlgebra(Algebra):
    """kron(w1, w2), where each matrix is stored as is or as two factors.

    No factor has the change's rows: each row is a product of rows of both matrices.
    """

    indivisible = "a LoKr"

    def find_error(self, factors: Factors) -> str | None:
        """Return an error message if the large LoKr matrix is missing; otherwise None."""
        return None if factors.keys() & {"lokr_w2", "lokr_w2_a"} else "it has lokr_w1 but no lokr_w2"

    def shape(self, shapes: Shapes) -> tuple[int, ...] | None:
        """Return the shape of the Kronecker product, out x in (x kernel).

        Raises:
            MismatchError: If the small matrix has kernel axes that the large matrix lacks.
        """
        if not any(name in shapes for name in _FIRST):
            return None
        small = shapes.get("lokr_w1")
        if not small:
            small = shape_with_core(shapes["lokr_w1_a"], shapes["lokr_w1_b"], core=None)
        large = shapes.get("lokr_w2")
        if not large:
            large = shape_with_core(shapes["lokr_w2_a"], shapes["lokr_w2_b"], shapes.get("lokr_t2"))
        if len(large) < len(small):
            raise MismatchError(f"its matrices are {list(small)} and {list(large)}")
        kernel_axes = [1] * (len(large) - len(small))  # only the large matrix has a kernel
        return tuple(a * b for a, b in zip((*small, *kernel_axes), large, strict=True))

    def compute_change(self, factors: Factors, scale: float) -> Tensor | None:
        """Return the Kronecker product of the two matrices, which is the change of the weight."""
        if not any(part in factors for part in _FIRST):
            return None
        first = factors.get("lokr_w1")
        if first is None:
            first = factors["lokr_w1_a"] @ factors["lokr_w1_b"]
        second = factors.get("lokr_w2")
        if second is None:
            second = product_with_core(factors["lokr_w2_a"], factors["lokr_w2_b"], factors.get("lokr_t2"))
        kernel_axes = second.ndim - first.ndim  # the small matrix has no kernel
        scaled = (first * scale).reshape(*first.shape, *[1] * kernel_axes)
        return torch.kron(scaled, second.contiguous())

    def select_rows(self, factors: Factors, rows: slice | Tensor) -> Factors | None:
        """Return None: each row of a LoKr's change depends on rows of both matrices."""
        return None if any(part in factors for part in _FIRST) else {}

    def slice_factors(self, factors: Factors, height: int, start: int, stop: int) -> Factors | None:
        """Return the factors of rows that cover whole copies of the large LoKr matrix; else None."""
        first = next(part for part in _FIRST if part in factors)
        block_height = height // len(factors[first])  # rows of the large matrix, k
        if start % block_height or stop % block_height:
            return None
        kept_rows = factors[first][start // block_height : stop // block_height]
        return {**factors, first: kept_rows.clone()}


def add_lokr(x: Tensor, factors: Mapping[str, Tensor], strength: float) -> Tensor:
    """Return x @ kron(w1, w2)^T without computing the Kronecker product.

    Args:
        x: Input, ... x m*n.
        factors: Factors of the module, by name (`lokr_w1`, ...).
        strength: Multiplier of the change.

    Returns:
        The LoKr's addition to the layer's output, ... x l*k.
    """
    # each matrix is stored as is, or as two low-rank factors
    w1_factors = _in_order(factors, "lokr_w1")
    w2_factors = _in_order(factors, "lokr_w2")
    n = w2_factors[0].shape[1]
    # kron(w1, w2) applies w2 to the last axis and w1 to the axis before it
    hidden = x.unflatten(-1, (x.shape[-1] // n, n))  # ... m n
    for factor in w2_factors:
        hidden = functional.linear(hidden, factor.to(x.dtype))
    hidden = hidden.transpose(-1, -2)  # ... k m
    for factor in (w1_factors[0] * strength, *w1_factors[1:]):
        hidden = functional.linear(hidden, factor.to(x.dtype))
    return hidden.transpose(-1, -2).flatten(-2)  # ... k l -> ... l*k


def convolve_lokr(x: Tensor, factors: Mapping[str, Tensor], strength: float, geometry: Geometry) -> Tensor:
    """Return the convolution of x with kron(w1, w2) without computing the Kronecker product.

    w2, which has the kernel, is applied to n of the m*n channels at a time; then w1 mixes the m groups.

    Args:
        x: Input, B x m*n x H x W.
        factors: Factors of the module, by name (`lokr_w1`, ...).
        strength: Multiplier of the change.
        geometry: Geometry of the convolution.

    Returns:
        B x l*k x H' x W'.
    """
    w1_factors = _in_order(factors, "lokr_w1")
    w2_factors = _in_order(factors, "lokr_w2")
    m = w1_factors[0].shape[1]
    hidden = x.unflatten(1, (m, x.shape[1] // m)).flatten(0, 1)  # B*m n H W
    hidden = geometry.convolve(hidden, w2_factors[0].to(x.dtype))
    for factor in w2_factors[1:]:
        hidden = functional.conv2d(hidden, factor.to(x.dtype)[:, :, None, None])
    hidden = hidden.unflatten(0, (len(x), m))  # B m k H' W'
    for factor in (w1_factors[0] * strength, *w1_factors[1:]):
        hidden = torch.einsum("l m, b m k h w -> b l k h w", factor.to(x.dtype), hidden)
    return hidden.flatten(1, 2)


def _norm(factors: Mapping[str, Tensor]) -> Tensor:
    # the norm of a Kronecker product is the product of the norms
    first_norm = torch.linalg.vector_norm(_full(factors, "lokr_w1"))
    second_norm = torch.linalg.vector_norm(_full(factors, "lokr_w2"))
    return first_norm * second_norm


def _initialize(name: str, weight: nn.Parameter) -> None:
    if name in ("lokr_w2", "lokr_w2_b"):  # the large matrix is zero, so that the change is zero at first
        nn.init.zeros_(weight)
    else:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def _is_scaled(shapes: Shapes) -> bool:
    # as in LyCORIS, alpha / rank does not apply if neither matrix is factored, because there is no rank
    return not {"lokr_w1", "lokr_w2"} <= shapes.keys()


def _in_order(factors: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """Return [matrix], or its two low-rank factors in the order in which they multiply an input."""
    return [factors[name]] if name in factors else [factors[f"{name}_b"], factors[f"{name}_a"]]


def _full(factors: Mapping[str, Tensor], name: str) -> Tensor:
    return factors[name] if name in factors else factors[f"{name}_a"] @ factors[f"{name}_b"]


PRODUCT = Product(
    kind="LoKr",
    add=add_lokr,
    convolve=convolve_lokr,
    norm=_norm,
    initialize=_initialize,
    is_scaled=_is_scaled,
)
