"""Compute LoRA layers whose frozen modules get the same tensor (such as q, k and v) together.

Three separate layers cast their input three times, multiply it by three down factors, and add three products
to its gradient. Here, the first layer that gets the tensor casts it and multiplies it by a matrix of all down
factors; the others take their columns of the product. This saves kernels, for which a GPU may wait. If all
modules are plain linear layers, the first layer computes the outputs of all layers: one autograd function
instead of two or three per layer costs the host less, and products are added in place. If the frozen weights
are adjacent in memory (networks/adjacent_weights.py), one product computes all outputs.
"""
# Letters: M rows of all samples, R rank (the sum of ranks for a matrix of all layers)

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from networks.adjacent_weights import (
    MAX_JOINED,
    add_products,
    multiply_parts,
    multiply_transposed,
    view_as_one_matrix,
)
from networks.lora_products import add_product, flatten_rows, project_in_place_gradient


class GroupedLayer(Protocol):
    """LoRA layer that `SharedInput` multiplies together with other layers that have the same input."""

    @property
    def original(self) -> nn.Linear | nn.Conv2d:
        """The frozen module."""
        ...

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Return whether the layer only adds a LoRA product to a Linear with a weight of this dtype."""
        ...


@dataclass
class _PassState:
    """What one forward pass has computed for the layers that share an input."""

    uncast_input: Tensor | None = None
    cast_input: Tensor | None = None
    input: Tensor | None = None  # the input that `products` are for
    frozen_input: Tensor | None = None  # the same values for the frozen modules; see `multiply`
    products: dict[GroupedLayer, Tensor] = field(default_factory=dict)  # not yet taken by the layers


class SharedInput:
    """LoRA products of layers with the same input, computed together and kept until they are used."""

    def __init__(
        self,
        layers: Sequence[GroupedLayer],
        ranks: Sequence[int],
        down: Tensor,
        ups: Sequence[Tensor],
        stacked_up: Tensor,
    ) -> None:
        """Prepare a forward pass of the model.

        Args:
            layers: Layers without dropout, whose frozen modules get the same tensor.
            ranks: Rank of each layer.
            down: The down factors stacked vertically, in the dtype of the pass.
            ups: The up factor of each layer, times its scale, in the dtype of the pass.
            stacked_up: The matrices `ups` stacked vertically.
        """
        self.layers = tuple(layers)
        self.ranks = list(ranks)
        self.down = down
        self.ups = list(ups)
        self.stacked_up = stacked_up
        # if False, each layer calls its frozen module itself, and takes only its part of the product
        self.computes_outputs = all(layer.is_plain(down.dtype) for layer in layers)
        self._state = _PassState()

    def cast(self, x: Tensor) -> Tensor:
        """Return the input in the factors' dtype; the same tensor is cast only once."""
        state = self._state
        if state.uncast_input is not x or state.cast_input is None:
            state.uncast_input = x
            state.cast_input = x.to(self.down.dtype)
        return state.cast_input

    def multiply(self, layer: GroupedLayer, x: Tensor, adds_gradient_in_place: bool) -> tuple[Tensor, Tensor]:
        """Return the input for a layer's frozen module, and the input times the layer's down factor.

        Args:
            layer: One of the layers.
            x: Input, ... x in, in the dtype of the factors.
            adds_gradient_in_place: Whether the gradient of the input is added in place; the value for the
                first layer applies to all layers.

        Returns:
            The input, ... x in, and the product, ... x R. If gradients are added in place, the input is a
            view whose backward pass does that.
        """
        state = self._state
        # the first layer of the group in this pass computes the products for all layers
        if state.input is not x or layer not in state.products:
            state.input = x
            state.frozen_input = x
            if adds_gradient_in_place:
                state.frozen_input, product = project_in_place_gradient(x, self.down)
            else:
                product = functional.linear(x, self.down)
            state.products = dict(zip(self.layers, product.split(self.ranks, -1), strict=True))
        assert state.frozen_input is not None
        return state.frozen_input, self._take_product(layer)

    def compute(self, layer: GroupedLayer, x: Tensor) -> Tensor:
        """Return the output of a layer's frozen module and its LoRA, ... x out; only if `computes_outputs`.

        Args:
            layer: One of the layers.
            x: Input, ... x in, in the dtype of the factors.
        """
        state = self._state
        # the first layer of the group in this pass computes the outputs of all layers
        if state.input is not x or layer not in state.products:
            state.input = x
            state.products = dict(zip(self.layers, self._compute_outputs(x), strict=True))
        return self._take_product(layer)

    def _compute_outputs(self, x: Tensor) -> Sequence[Tensor]:
        """Return the output of each layer's frozen module and its LoRA, ... x out."""
        weights = [layer.original.weight for layer in self.layers]
        all_biases = [layer.original.bias for layer in self.layers]  # None for modules without bias
        split_sizes = [len(weight) for weight in weights]
        num_rows = x.numel() // x.shape[-1]
        # one product for all layers saves kernel launches, which only matter for small outputs
        is_small = num_rows * sum(split_sizes) <= MAX_JOINED
        joined_weight = view_as_one_matrix(weights) if is_small else None  # None if they are not adjacent
        if joined_weight is not None:
            biases = [bias for bias in all_biases if bias is not None]
            joined_bias = view_as_one_matrix(biases) if biases else None
            if joined_bias is not None or not biases:
                return _JoinedOutputs.apply(
                    split_sizes, x, self.down, self.stacked_up, joined_weight, joined_bias
                )
        return _Outputs.apply(self.ranks, x, self.down, *self.ups, *weights, *all_biases)

    def _take_product(self, layer: GroupedLayer) -> Tensor:
        """Return a layer's product or output and forget it; after the last layer, release all tensors."""
        product = self._state.products.pop(layer)
        if not self._state.products:
            self._state = _PassState()
        return product


class _Outputs(torch.autograd.Function):
    """Frozen linear layers with their LoRAs; products are added in place, so each sum is rounded only once.

    The inputs after `down` are the up factors, the weights and the biases of all layers.
    """

    @staticmethod
    def forward(ctx: Any, ranks: Sequence[int], x: Tensor, down: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Return the output of each layer: x W^T + bias + x @ down^T @ up^T."""
        # `rest`: one up factor per layer, then one weight per layer, then one bias per layer
        num_layers = len(ranks)
        ups = rest[:num_layers]
        weights = rest[num_layers : 2 * num_layers]
        biases = rest[2 * num_layers :]
        # `down` stacks the down factors of all layers: one product, split by rank below
        product = functional.linear(x, down)
        ctx.set_materialize_grads(False)
        ctx.ranks = ranks
        ctx.save_for_backward(x, product, down, *ups, *weights)
        outputs = []
        parts = flatten_rows(product).split(ranks, -1)
        for part, up, weight, bias in zip(parts, ups, weights, biases, strict=True):
            output = functional.linear(x, weight, bias)
            outputs.append(add_product(output, part, up.t()))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of x, the down factor and the up factors; frozen weights get none."""
        # outputs were y = x W^T + bias + (x D^T) U^T; `product` is x D^T of all layers side by side
        x, product, down, *ups_and_weights = ctx.saved_tensors
        num_layers = len(ctx.ranks)
        ups = ups_and_weights[:num_layers]
        weights = ups_and_weights[num_layers:]
        _, needs_x, needs_down, *_ = ctx.needs_input_grad
        product = flatten_rows(product)
        parts = product.split(ctx.ranks, -1)
        grad_product = torch.empty_like(product)
        grad_parts = grad_product.split(ctx.ranks, -1)  # views, which are filled below
        grad_x: Tensor | None = None
        grad_ups: list[Tensor | None] = []
        for index, gradient in enumerate(gradients):
            if gradient is None:  # nothing depends on this output
                grad_parts[index].zero_()
                grad_ups.append(None)
                continue
            gradient = flatten_rows(gradient)
            # gradient of x @ down^T for this layer, into its columns of grad_product
            torch.mm(gradient, ups[index], out=grad_parts[index])
            grad_ups.append(gradient.t() @ parts[index])
            # the gradient of x is the sum over all layers
            if needs_x and grad_x is None:
                grad_x = gradient @ weights[index]
            elif grad_x is not None:
                grad_x = grad_x.addmm_(gradient, weights[index])
        grad_down = grad_product.t() @ flatten_rows(x) if needs_down else None
        if grad_x is not None:
            grad_x = grad_x.addmm_(grad_product, down).view(x.shape)
        no_gradients = [None] * (2 * num_layers)  # for weights and biases
        return None, grad_x, grad_down, *grad_ups, *no_gradients


class _JoinedOutputs(torch.autograd.Function):
    """Computes all layers' outputs in a single product; their weights must be adjacent in memory."""

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
        """Return the output of each layer: x W^T + bias + x @ down^T @ up^T."""
        product = flatten_rows(functional.linear(x, down))
        ctx.split_sizes = split_sizes
        ctx.save_for_backward(x, product, down, up, weight)
        output = functional.linear(x, weight, bias)
        # adds x @ down^T @ up^T of each layer to its columns, in place
        add_products(flatten_rows(output), product, up, split_sizes)
        return output.split(split_sizes, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Return the gradients of x, the down factor and the up factors; frozen weights get none."""
        x, product, down, up, weight = ctx.saved_tensors
        _, needs_x, needs_down, *_ = ctx.needs_input_grad
        gradient = torch.cat([flatten_rows(each) for each in gradients], -1)
        grad_product = multiply_parts(gradient, up, ctx.split_sizes)
        grad_up = multiply_transposed(gradient, product, ctx.split_sizes)
        grad_down = grad_product.t() @ flatten_rows(x) if needs_down else None
        grad_x = None
        if needs_x:
            grad_x = (gradient @ weight).addmm_(grad_product, down).view(x.shape)
        return None, grad_x, grad_down, grad_up, None, None
