"""LoHa and LoKr: networks whose change of a frozen weight is a product of small factors.

The weight is that of a Linear or a Conv2d.
LoHa's change is (w1_a w1_b) * (w2_a w2_b), element by element; LoKr's is kron(w1, w2). Neither needs the
frozen weight, whatever it is stored as, nor keeps the whole change for the backward pass. Factors have the
names and shapes of LyCORIS' files: those of a convolution are matrices too, in which the values of its kernel
are further columns, except for a large matrix of LoKr that stays whole.
Source: Yeh et al. 2023, arXiv 2309.14859.
"""
# Letters: R rank; out = l * k and in = m * n, the sizes that LoKr splits; B pictures, H W their size

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

Shapes = Mapping[str, tuple[int, ...]]
MakeShapes = Callable[[tuple[int, ...], int], Shapes]  # shape of a weight, out in (kernel); rank -> factors
Factored = nn.Linear | nn.Conv2d  # modules whose weight can have such a change
# the factors that begin as zeros: of a LoHa, and of a LoKr with its large matrix whole or in two factors
_FIRST_ZERO = {"hada_w2_a", "lokr_w2", "lokr_w2_b"}


class FactoredLayer(nn.Module):
    """`y + multiplier * scale * x @ change(factors)` in place of the forward of a frozen Linear or Conv2d.

    The factors are float32 and compute in autocast's dtype, or in float32 without autocast.
    """

    alpha: Tensor

    def __init__(self, original: Factored, shapes: Shapes, rank: int, alpha: float) -> None:
        """shapes: of the factors by name, from `loha_shapes` or `lokr_shapes`. alpha: 0 means rank.

        A Conv2d is one of a single group that pads with zeros.
        """
        super().__init__()
        is_loha = "hada_w1_a" in shapes
        self.kind = "LoHa" if is_loha else "LoKr"
        self.is_scaled = not {"lokr_w1", "lokr_w2"} <= shapes.keys()  # two whole matrices are not scaled
        stored_alpha = float(alpha or rank) if self.is_scaled else float(rank)
        self.register_buffer("alpha", torch.tensor(stored_alpha))
        for name, shape in shapes.items():
            weight = nn.Parameter(torch.empty(shape))
            self.register_parameter(name, weight)
            _set_first_values(name, weight)
        self.rank = rank
        self.multiplier = 1.0
        self.factors = tuple(shapes)
        self._add = _choose_product(original, is_loha)
        self._original = (original,)  # in a tuple, so that it is not registered as a submodule
        self._before: Callable[[Tensor], Tensor] = original.forward
        self.register_load_state_dict_post_hook(lambda layer, _: layer.read_alpha())
        self.read_alpha()

    def read_alpha(self) -> None:
        """Update the scale alpha / rank; two whole matrices are not scaled."""
        self.scale = (float(self.alpha) or self.rank) / self.rank if self.is_scaled else 1.0

    def attach(self) -> None:
        self._before = self._original[0].forward
        self._original[0].forward = self.forward  # type: ignore[assignment,method-assign]

    def forward(self, x: Tensor) -> Tensor:
        # x: ... in, or B in H W
        autocast = torch.is_autocast_enabled(x.device.type)
        if autocast and x.dtype == torch.float32:
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, for the original too
        out = self._before(x)
        if self.multiplier == 0:
            return out
        if not autocast:
            x = x.to(self.alpha.dtype)
        factors = {name: self.get_parameter(name) for name in self.factors}
        return out + self._add(x, factors, self.multiplier * self.scale).to(out.dtype)

    def norm(self) -> Tensor:
        """Return the Frobenius norm of the change at multiplier 1."""
        factors = {name: self.get_parameter(name) for name in self.factors}
        if "hada_w1_a" in factors:
            first = factors["hada_w1_a"] @ factors["hada_w1_b"]
            second = factors["hada_w2_a"] @ factors["hada_w2_b"]
            return torch.linalg.vector_norm(first * second) * self.scale
        first_norm = torch.linalg.vector_norm(_whole(factors, "lokr_w1"))
        second_norm = torch.linalg.vector_norm(_whole(factors, "lokr_w2"))
        return first_norm * second_norm * self.scale

    def shrink(self, ratio: Tensor) -> None:
        self.get_parameter(self.factors[0]).mul_(ratio)


def _set_first_values(name: str, weight: nn.Parameter) -> None:
    """Set a factor as LyCORIS does: one of each layer is zero, so the change begins with nothing."""
    if name in _FIRST_ZERO:
        nn.init.zeros_(weight)
    elif name.startswith("hada"):
        nn.init.normal_(weight, std=0.1 if name == "hada_w1_a" else 1.0)
    else:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def _choose_product(original: Factored, is_loha: bool) -> Callable[..., Tensor]:
    """Return the function that computes what is added to a module's output: of x, factors and a strength."""
    if isinstance(original, nn.Linear):
        return add_loha if is_loha else add_lokr
    return partial(convolve_loha if is_loha else convolve_lokr, geometry=Geometry.of(original))


def loha_shapes(weight: tuple[int, ...], rank: int) -> Shapes:
    """Return the shapes of a LoHa's factors. weight: out in (kernel)."""
    left = (weight[0], rank)
    right = (rank, math.prod(weight[1:]))
    return {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left, "hada_w2_b": right}


def lokr_shapes(weight: tuple[int, ...], rank: int, factor: int = -1, decompose_both: bool = False) -> Shapes:
    """Return the shapes of a LoKr's factors; matrices up to twice the rank (larger side) stay whole.

    weight: out in (kernel). factor: see `split_size`. decompose_both: the small matrix gets two factors too,
    if that makes it smaller.
    """
    kernel = weight[2:]
    l, k = split_size(weight[0], factor)  # noqa: E741
    m, n = split_size(weight[1], factor)
    first: Shapes = {"lokr_w1": (l, m)}
    if decompose_both and rank < max(l, m) / 2:
        first = {"lokr_w1_a": (l, rank), "lokr_w1_b": (rank, m)}
    if rank < max(k, n) / 2:
        return {**first, "lokr_w2_a": (k, rank), "lokr_w2_b": (rank, n * math.prod(kernel))}
    return {**first, "lokr_w2": (k, n, *kernel)}


def split_size(size: int, factor: int) -> tuple[int, int]:
    """Return two numbers whose product is `size`, the smaller one first.

    factor: one of the two if it divides the size, else the smaller one is the largest divisor up to it. -1:
    as equal as possible.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    most = math.isqrt(size) if factor < 1 else min(factor, math.isqrt(size))
    small = next(number for number in range(most, 0, -1) if size % number == 0)
    return small, size // small


def add_lokr(x: Tensor, factors: Mapping[str, Tensor], strength: float) -> Tensor:
    """Return x @ kron(w1, w2)^T without forming the product. x: ... m*n. Returns ... l*k."""
    first = _parts(factors, "lokr_w1")
    second = _parts(factors, "lokr_w2")
    width = second[0].shape[1]  # n
    hidden = x.unflatten(-1, (x.shape[-1] // width, width))
    for factor in second:
        hidden = functional.linear(hidden, factor.to(x.dtype))
    hidden = hidden.transpose(-1, -2)  # ... k m
    for factor in (first[0] * strength, *first[1:]):
        hidden = functional.linear(hidden, factor.to(x.dtype))
    return hidden.transpose(-1, -2).flatten(-2)


def add_loha(x: Tensor, factors: Mapping[str, Tensor], strength: float) -> Tensor:
    """Return x @ ((w1_a w1_b) * (w2_a w2_b))^T. x: ... in. Returns ... out."""
    w1_a = (factors["hada_w1_a"] * strength).to(x.dtype)
    w1_b = factors["hada_w1_b"].to(x.dtype)
    w2_a = factors["hada_w2_a"].to(x.dtype)
    w2_b = factors["hada_w2_b"].to(x.dtype)
    result: Tensor = _HadamardLinear.apply(x, w1_a, w1_b, w2_a, w2_b)
    return result


class _HadamardLinear(torch.autograd.Function):
    """Save only the factors for the backward pass, not the three matrices of the weight's size."""

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
        of_x = gradient @ (first * second) if ctx.needs_input_grad[0] else None
        of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)  # out in
        of_first = of_weight * second
        of_second = of_weight * first
        return of_x, of_first @ w1_b.T, w1_a.T @ of_first, of_second @ w2_b.T, w2_a.T @ of_second


@dataclass(frozen=True)
class Geometry:
    """How a convolution of one group moves over a picture."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.Conv2d) -> "Geometry":
        assert not isinstance(module.padding, str)
        return cls(module.kernel_size, module.stride, module.padding, module.dilation)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution of x, B in H W. weight: out in * kernel, or out in kernel."""
        shaped = weight.view(weight.shape[0], x.shape[1], *self.kernel)
        return functional.conv2d(x, shaped, None, self.stride, self.padding, self.dilation)

    def gradients(
        self, x: Tensor, weight: Tensor, gradient: Tensor, needs_input: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Return the gradients of x, if it is needed, and of the weight, out x in * kernel."""
        shaped = weight.view(weight.shape[0], x.shape[1], *self.kernel)
        of_weight = conv2d_weight(x, shaped.shape, gradient, self.stride, self.padding, self.dilation)
        of_x = None
        if needs_input:
            of_x = conv2d_input(x.shape, shaped, gradient, self.stride, self.padding, self.dilation)
        return of_x, of_weight.view_as(weight)


def convolve_lokr(x: Tensor, factors: Mapping[str, Tensor], strength: float, geometry: Geometry) -> Tensor:
    """Return the convolution of x with kron(w1, w2) without forming it. x: B m*n H W. Returns B l*k H' W'."""
    first = _parts(factors, "lokr_w1")
    second = _parts(factors, "lokr_w2")
    m = first[0].shape[1]
    hidden = x.unflatten(1, (m, x.shape[1] // m)).flatten(0, 1)  # B*m n H W
    hidden = geometry.convolve(hidden, second[0].to(x.dtype))
    for factor in second[1:]:
        hidden = functional.conv2d(hidden, factor.to(x.dtype)[:, :, None, None])
    hidden = hidden.unflatten(0, (len(x), m))  # B m k H' W'
    for factor in (first[0] * strength, *first[1:]):
        hidden = torch.einsum("l m, b m k h w -> b l k h w", factor.to(x.dtype), hidden)
    return hidden.flatten(1, 2)


def convolve_loha(x: Tensor, factors: Mapping[str, Tensor], strength: float, geometry: Geometry) -> Tensor:
    """Return the convolution of x with (w1_a w1_b) * (w2_a w2_b). x: B in H W. Returns B out H' W'."""
    w1_a = (factors["hada_w1_a"] * strength).to(x.dtype)
    w1_b = factors["hada_w1_b"].to(x.dtype)
    w2_a = factors["hada_w2_a"].to(x.dtype)
    w2_b = factors["hada_w2_b"].to(x.dtype)
    result: Tensor = _HadamardConvolution.apply(geometry, x, w1_a, w1_b, w2_a, w2_b)
    return result


class _HadamardConvolution(torch.autograd.Function):
    """As `_HadamardLinear`, for a convolution."""

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
        of_x, of_weight = ctx.geometry.gradients(x, first * second, gradient, ctx.needs_input_grad[1])
        of_first = of_weight * second
        of_second = of_weight * first
        return None, of_x, of_first @ w1_b.T, w1_a.T @ of_first, of_second @ w2_b.T, w2_a.T @ of_second


def _parts(factors: Mapping[str, Tensor], name: str) -> list[Tensor]:
    return [factors[name]] if name in factors else [factors[f"{name}_b"], factors[f"{name}_a"]]


def _whole(factors: Mapping[str, Tensor], name: str) -> Tensor:
    return factors[name] if name in factors else factors[f"{name}_a"] @ factors[f"{name}_b"]
