"""Build the layers of adapters whose weight change is a product of factors: LoHa, LoKr."""

import math
from collections.abc import Mapping

from torch import nn

from modules.errors import CheckpointError
from networks.delta import read_delta
from networks.factored_layer import Factored, FactoredLayer, MakeShapes, Product
from networks.kinds.contract import Target
from networks.kinds.factors import Factors
from networks.module_factors import UNTRAINABLE_FACTORS, get_lora_rank, without_alpha


def make_layers(
    targets: Mapping[str, Target], make_shapes: MakeShapes, product: Product
) -> dict[str, nn.Module]:
    """Build a `FactoredLayer` for each target; `make_shapes` maps a weight's shape to factor shapes."""
    layers: dict[str, nn.Module] = {}
    for name, target in targets.items():
        module = target.module
        shapes = make_shapes(_get_weight_shape(module), target.rank)
        layers[name] = FactoredLayer(module, shapes, target.rank, target.alpha, product)
    return layers


def _get_weight_shape(module: Factored) -> tuple[int, ...]:
    """Return the shape of a module's weight, out x in (x kernel)."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features  # a quantized weight may have another shape
    return tuple(module.weight.shape)


def make_layer(module: Factored, path: str, factors: Factors, product: Product) -> FactoredLayer:
    """Return a layer for a module with the rank and alpha of a file's factors.

    Raises:
        CheckpointError: If the factors do not fit the module's weight, or have a core (LyCORIS' use_tucker)
            or magnitudes, which cannot be trained.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in without_alpha(factors).items()}
    shape = _get_weight_shape(module)
    matrix_shape = (shape[0], math.prod(shape[1:]))  # some files store convolutions as matrices
    is_trainable = UNTRAINABLE_FACTORS.isdisjoint(shapes)
    if not is_trainable or read_delta(factors).change_shape() not in (shape, matrix_shape):
        raise CheckpointError(
            f"--dim_from_weights: {path} has {shapes}, which cannot be trained on this layer of "
            f"shape {list(shape)}"
        )
    rank = get_lora_rank(factors)  # None for full matrices, which get 1 below
    alpha: float = rank or 1  # by default, alpha / rank is 1
    if rank and "alpha" in factors:
        alpha = float(factors["alpha"])
    return FactoredLayer(module, shapes, rank or 1, alpha, product)
