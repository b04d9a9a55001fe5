"""LoRA layers whose frozen modules get the same tensor, such as those for q, k and v, in fewer products.

Each for itself, three layers cast their input three times, multiply it by three down factors and add three
products to its gradient. Here the first layer that gets the tensor casts it and multiplies it by the down
factors of all, one below another; the others take their columns. Where a GPU waits for the host, a step is
shorter by these kernels.
"""
# Letters: R rank

from collections.abc import Sequence

import torch.nn.functional as functional
from torch import Tensor, nn

from networks.lora_products import branch


class SharedInput:
    """What layers compute of their common input; it holds tensors until each layer has taken its part."""

    def __init__(self, layers: Sequence[nn.Module], ranks: Sequence[int], down: Tensor) -> None:
        """Prepare a pass of the model.

        Args:
            layers: Layers without dropouts, whose frozen modules get the same tensor.
            ranks: Rank of each layer.
            down: Their down factors, one below another, in the dtype of the pass.
        """
        self.layers = tuple(layers)
        self.ranks = list(ranks)
        self.down = down
        self._forget()

    def _forget(self) -> None:
        self._wide: Tensor | None = None
        self._narrow: Tensor | None = None
        self._source: Tensor | None = None
        self._passed_on: Tensor | None = None
        self._products: dict[nn.Module, Tensor] = {}

    def cast(self, x: Tensor) -> Tensor:
        """Return the input in the dtype of the factors; layers that give the same tensor get the same."""
        if self._wide is not x or self._narrow is None:
            self._wide = x
            self._narrow = x.to(self.down.dtype)
        return self._narrow

    def multiply(self, layer: nn.Module, x: Tensor, joins: bool) -> tuple[Tensor, Tensor]:
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
        product = self._products.pop(layer)
        if not self._products:
            self._forget()
        return passed_on, product
