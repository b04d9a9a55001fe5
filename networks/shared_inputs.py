"""LoRA layers whose frozen modules get the same tensor, such as those for q, k and v, in fewer products.

Each for itself, three layers cast their input three times, multiply it by three down factors and add three
products to its gradient. Here the first layer that gets the tensor casts it and multiplies it by the down
factors of all, one below another; the others take their columns. Where a GPU waits for the host, a step is
shorter by these kernels. Of plain linear modules, the first layer computes the outputs of all: one function
of autograd instead of two or three for each layer, which costs the host less, and products added in place. If
their weights lie together (networks/joined_weights.py), one product has the outputs of all.
"""
# Letters: M rows of all samples, R rank, of all layers together where a matrix is joined

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from networks.joined_weights import MAX_JOINED, add_products, joined, multiply_parts, multiply_transposed
from networks.lora_products import add_product, branch, rows_of


class GroupedLayer(Protocol):
    """What is asked of a LoRA layer that shares its input."""

    @property
    def original(self) -> nn.Linear | nn.Conv2d:
        """The frozen module."""
        ...

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Return whether the layer only adds the product of its factors to a linear layer in a dtype."""
        ...


class SharedInput:
    """What layers compute of their common input; it holds tensors until each layer has taken its part."""

    def __init__(
        self,
        layers: Sequence[GroupedLayer],
        ranks: Sequence[int],
        down: Tensor,
        ups: Sequence[Tensor],
        up: Tensor,
    ) -> None:
        """Prepare a pass of the model.

        Args:
            layers: Layers without dropouts, whose frozen modules get the same tensor.
            ranks: Rank of each layer.
            down: Their down factors, one below another, in the dtype of the pass.
            ups: The up factor of each layer, times its scale, in the dtype of the pass.
            up: These, one below another.
        """
        self.layers = tuple(layers)
        self.ranks = list(ranks)
        self.down = down
        self.ups = list(ups)
        self.up = up
        # else each layer asks for its part of the product, and calls its frozen module itself
        self.computes_outputs = all(layer.is_plain(down.dtype) for layer in layers)
        self._forget()

    def _forget(self) -> None:
        self._wide: Tensor | None = None
        self._narrow: Tensor | None = None
        self._source: Tensor | None = None
        self._passed_on: Tensor | None = None
        self._products: dict[GroupedLayer, Tensor] = {}

    def cast(self, x: Tensor) -> Tensor:
        """Return the input in the dtype of the factors; layers that give the same tensor get the same."""
        if self._wide is not x or self._narrow is None:
            self._wide = x
            self._narrow = x.to(self.down.dtype)
        return self._narrow

    def multiply(self, layer: GroupedLayer, x: Tensor, joins: bool) -> tuple[Tensor, Tensor]:
        """Return the input that the frozen module of a layer gets, and the input times the down factor.

        Args:
            layer: One of the layers.
            x: Input, ... in, in the dtype of the factors.
            joins: Whether the gradient of the input is added in place (`networks.lora_products.branch`); of
                several layers, the first decides.

        Returns:
            The input, ... in, and the product, ... R.
        """
        if self._source is not x or layer not in self._products:
            self._source = x
            self._passed_on = x
            if joins:
                self._passed_on, product = branch(x, self.down)
            else:
                product = functional.linear(x, self.down)
            parts = product.split(self.ranks, -1)
            self._products = dict(zip(self.layers, parts, strict=True))
        assert self._passed_on is not None
        passed_on = self._passed_on
        return passed_on, self._take(layer)

    def compute(self, layer: GroupedLayer, x: Tensor) -> Tensor:
        """Return the output of a layer, ... out, of its frozen module and its LoRA; see `computes_outputs`.

        Args:
            layer: One of the layers.
            x: Input, ... in, in the dtype of the factors.
        """
        if self._source is not x or layer not in self._products:
            self._source = x
            modules = [each.original for each in self.layers]
            weights = [module.weight for module in modules]
            biases = [module.bias for module in modules if module.bias is not None]
            split_sizes = [len(weight) for weight in weights]
            weight = bias = None
            if x.numel() // x.shape[-1] * sum(split_sizes) <= MAX_JOINED:
                weight = joined(weights)
                bias = joined(biases) if weight is not None and biases else None
            outputs: Sequence[Tensor]
            if weight is not None and (bias is not None or not biases):
                outputs = _JoinedOutputs.apply(split_sizes, x, self.down, self.up, weight, bias)
            else:
                every_bias = [module.bias for module in modules]
                outputs = _Outputs.apply(self.ranks, x, self.down, *self.ups, *weights, *every_bias)
            self._products = dict(zip(self.layers, outputs, strict=True))
        return self._take(layer)

    def _take(self, layer: GroupedLayer) -> Tensor:
        """Return the part of a layer; after the last one, nothing is held."""
        product = self._products.pop(layer)
        if not self._products:
            self._forget()
        return product


class _Outputs(torch.autograd.Function):
    """Frozen linear layers and their LoRAs; sums are rounded once, because products are added in place."""

    @staticmethod
    def forward(ctx: Any, ranks: Sequence[int], x: Tensor, down: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        count = len(ranks)
        ups, weights, biases = rest[:count], rest[count : 2 * count], rest[2 * count :]
        product = functional.linear(x, down)
        ctx.set_materialize_grads(False)
        ctx.ranks = ranks
        ctx.save_for_backward(x, product, down, *ups, *weights)
        outputs = []
        parts = rows_of(product).split(ranks, -1)
        for part, up, weight, bias in zip(parts, ups, weights, biases, strict=True):
            output = functional.linear(x, weight, bias)
            outputs.append(add_product(output, part, up.t()))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, product, down, *rest = ctx.saved_tensors
        count = len(ctx.ranks)
        ups, weights = rest[:count], rest[count:]
        _, needs_x, needs_down, *_ = ctx.needs_input_grad
        product = rows_of(product)
        of_product = torch.empty_like(product)
        of_x: Tensor | None = None
        of_ups: list[Tensor | None] = []
        parts = zip(
            gradients,
            ups,
            weights,
            product.split(ctx.ranks, -1),
            of_product.split(ctx.ranks, -1),
            strict=True,
        )
        for gradient, up, weight, part, of_part in parts:
            if gradient is None:  # nothing depends on this output
                of_part.zero_()
                of_ups.append(None)
                continue
            gradient = rows_of(gradient)
            torch.mm(gradient, up, out=of_part)
            of_ups.append(gradient.t() @ part)
            if needs_x:
                of_x = gradient @ weight if of_x is None else of_x.addmm_(gradient, weight)
        of_down = of_product.t() @ rows_of(x) if needs_down else None
        if of_x is not None:
            of_x = of_x.addmm_(of_product, down).view(x.shape)
        return None, of_x, of_down, *of_ups, *(None,) * (2 * count)


class _JoinedOutputs(torch.autograd.Function):
    """As `_Outputs`, of weights that lie together; the gradients of all outputs are joined once."""

    @staticmethod
    def forward(
        ctx: Any,
        split_sizes: Sequence[int],
        x: Tensor,
        down: Tensor,
        up: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        product = rows_of(functional.linear(x, down))
        ctx.split_sizes = split_sizes
        ctx.save_for_backward(x, product, down, up, weight)
        output = functional.linear(x, weight, bias)
        add_products(rows_of(output), product, up, split_sizes)
        return output.split(split_sizes, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, product, down, up, weight = ctx.saved_tensors
        _, needs_x, needs_down, *_ = ctx.needs_input_grad
        gradient = torch.cat([rows_of(each) for each in gradients], -1)
        of_product = multiply_parts(gradient, up, ctx.split_sizes)
        of_up = multiply_transposed(gradient, product, ctx.split_sizes)
        of_down = of_product.t() @ rows_of(x) if needs_down else None
        of_x = (gradient @ weight).addmm_(of_product, down).view(x.shape) if needs_x else None
        return None, of_x, of_down, of_up, None, None
