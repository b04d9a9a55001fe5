"""The trained layer for adapters whose weight change is a product of small factors: LoHa, LoKr.

The layer extends a Linear or a Conv2d. It does not read the frozen weight, which may be quantized, and does
not keep the full change for the backward pass. Factors have LyCORIS' names and shapes; a convolution's
factors are matrices too, whose columns include the kernel.
"""
# Letters: B images, H W their size

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from networks.kinds.algebra import MismatchError
from networks.kinds.factors import Shapes

MakeShapes = Callable[[tuple[int, ...], int], Shapes]  # shape of a weight, out in (kernel); rank -> factors
Factored = nn.Linear | nn.Conv2d  # modules whose weight can have such a change
Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Geometry:
    """Kernel size, stride, padding and dilation of a convolution with one group."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.Conv2d) -> "Geometry":
        """Return the stride, padding and so on of a Conv2d; its padding must be numeric, not "same"."""
        assert not isinstance(module.padding, str)
        return cls(module.kernel_size, module.stride, module.padding, module.dilation)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution of x, B x in x H x W.

        Args:
            x: Input, B x in x H x W.
            weight: Weight, out x in x kernel, which may be flattened to out x (in * kernel).
        """
        shaped = weight.view(weight.shape[0], x.shape[1], *self.kernel)
        return functional.conv2d(x, shaped, None, self.stride, self.padding, self.dilation)

    def gradients(
        self, x: Tensor, weight: Tensor, gradient: Tensor, needs_input: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Return the gradients of x (None unless `needs_input`) and of the weight, out x (in * kernel)."""
        shaped = weight.view(weight.shape[0], x.shape[1], *self.kernel)
        grad_weight = conv2d_weight(x, shaped.shape, gradient, self.stride, self.padding, self.dilation)
        grad_x = None
        if needs_input:
            grad_x = conv2d_input(x.shape, shaped, gradient, self.stride, self.padding, self.dilation)
        return grad_x, grad_weight.view_as(weight)


@dataclass(frozen=True)
class Product:
    """How a network kind (LoHa, LoKr) computes with its factors, without building the full change."""

    kind: str  # name of the kind, for messages
    # takes an input ... in, the factors, and a multiplier of the change; returns ... out
    add: Callable[[Tensor, Factors, float], Tensor]
    # takes an input B in H W, the factors, a multiplier, and a `Geometry`; returns B out H' W'
    convolve: Callable[..., Tensor]
    norm: Callable[[Factors], Tensor]  # returns the Frobenius norm of the change, without alpha / rank
    # initializes the factor with a name as LyCORIS does; one factor of each layer is zero
    initialize: Callable[[str, nn.Parameter], None]
    is_scaled: Callable[[Shapes], bool]  # returns whether the change is multiplied by alpha / rank


class FactoredLayer(nn.Module):
    """Replaces the forward of a Linear or Conv2d: `y + multiplier * scale * x @ change(factors)`.

    The factors are float32; they compute in autocast's dtype, or in float32 without autocast.
    """

    size_word = "rank"
    alpha: Tensor

    def __init__(self, original: Factored, shapes: Shapes, rank: int, alpha: float, product: Product) -> None:
        """Create the factors for a frozen module; a Conv2d must have one group and zero padding.

        Args:
            original: The frozen module.
            shapes: Shapes of the factors by name.
            rank: Rank of the factors.
            alpha: Numerator of the scale alpha / rank; 0 means the rank.
            product: Computes with the factors.
        """
        super().__init__()
        self.kind = product.kind
        self.is_scaled = product.is_scaled(shapes)
        # without a scale, alpha is the rank, so that alpha / rank is 1
        stored_alpha = float(alpha or rank) if self.is_scaled else float(rank)
        self.register_buffer("alpha", torch.tensor(stored_alpha))
        for name, shape in shapes.items():
            weight = nn.Parameter(torch.empty(shape))
            self.register_parameter(name, weight)
            product.initialize(name, weight)
        self.rank = rank
        self.multiplier = 1.0
        self.factors = tuple(shapes)
        self._norm = product.norm
        self._add: Callable[..., Tensor] = product.add
        if isinstance(original, nn.Conv2d):
            self._add = partial(product.convolve, geometry=Geometry.of(original))
        self._original = (original,)  # in a tuple, so that it is not registered as a submodule
        self._original_forward: Callable[[Tensor], Tensor] = original.forward
        self.register_load_state_dict_post_hook(lambda layer, _: layer.read_alpha())
        self.read_alpha()

    def read_alpha(self) -> None:
        """Recompute the scale alpha / rank after loading the buffer `alpha`; an alpha of 0 means the rank."""
        self.scale = (float(self.alpha) or self.rank) / self.rank if self.is_scaled else 1.0

    def attach(self) -> None:
        """Replace the forward method of the frozen module with this layer's."""
        self._original_forward = self._original[0].forward
        self._original[0].forward = self.forward  # type: ignore[assignment,method-assign]

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the frozen module plus the output of the factors."""
        # x: ... in, or B in H W
        is_autocast = torch.is_autocast_enabled(x.device.type)
        if is_autocast and x.dtype == torch.float32:
            # cast once for both the frozen module and the LoRA
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out = self._original_forward(x)
        if self.multiplier == 0:
            return out
        if not is_autocast:
            x = x.to(self.alpha.dtype)
        factors = {name: self.get_parameter(name) for name in self.factors}
        return out + self._add(x, factors, self.multiplier * self.scale).to(out.dtype)

    def norm(self) -> Tensor:
        """Return the Frobenius norm of the change at multiplier 1."""
        return self._norm({name: self.get_parameter(name) for name in self.factors}) * self.scale

    def shrink(self, ratio: Tensor) -> None:
        """Multiply the change by `ratio`: only the first factor, because the change is a product of all."""
        self.get_parameter(self.factors[0]).mul_(ratio)


def product_with_core(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """Return a @ b, out x in.

    With a core, r x r x kernel, the result is out x in x kernel: `a`, stored r x out, multiplies the first
    axis of the core, and `b`, r x in, the second axis.
    """
    if core is None:
        return a @ b
    return torch.einsum("p q ..., p o, q i -> o i ...", core, a, b)


def shape_with_core(a: tuple[int, ...], b: tuple[int, ...], core: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the shape of a @ b, or of the product with a core between them: out x in (x kernel).

    Args:
        a: Shape of the left factor, out x r; with a core, r x out.
        b: Shape of the right factor, r x in.
        core: Shape of the core, r x r x kernel; None without a core.

    Raises:
        MismatchError: If the factors cannot be multiplied.
    """
    are_matrices = len(a) == len(b) == 2
    if core is None:
        have_equal_rank = a[1:2] == b[:1]
        shape = (a[0], *b[1:])
    else:
        have_equal_rank = core[:2] == (a[0], b[0])
        shape = (a[1], b[1], *core[2:])
    if not (are_matrices and have_equal_rank):
        shape_list = [list(factor) for factor in (a, b, core) if factor is not None]
        raise MismatchError(f"factors of {shape_list} cannot be multiplied")
    return shape
