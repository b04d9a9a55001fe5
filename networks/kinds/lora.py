"""LoRA: the change of a weight is the product of two low-rank matrices.

The trained layer is in `networks/lora_layer.py`.
Source: Hu et al. 2021, arXiv 2106.09685.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from networks.kinds.contract import LoraModule, NetworkKind, Settings, Target
from networks.kinds.factors import BIAS, DOWN, MID, UP, Factors

if TYPE_CHECKING:  # --help must not import torch
    from torch import nn

    from networks.kinds.lora_algebra import LoraAlgebra
    from networks.lora_layer import LoraLayer


class LoraKind(NetworkKind):
    """LoRA: the change of a weight is the product of two low-rank matrices."""

    name = "LoRA"
    parts = (DOWN, UP, MID, BIAS)
    marks = (DOWN,)
    pairs = ((DOWN, UP),)
    rank_parts = (DOWN,)
    network_module = "networks.lora"
    algorithms = ("lora", "locon")
    orders = ((DOWN, UP),)
    is_sized_by_rank = True
    takes_all_settings = True

    def load_algebra(self) -> "LoraAlgebra":
        """Return the object that computes with low-rank factors."""
        from networks.kinds.lora_algebra import LoraAlgebra  # torch

        return LoraAlgebra()

    def make_layers(
        self, targets: Mapping[str, Target], settings: Settings, kind_arguments: Any
    ) -> "dict[str, nn.Module]":
        """Return a trainable layer for each target, extended by the settings' variants, such as DoRA."""
        from networks.lora_layer import LoraLayer  # torch

        layers: dict[str, nn.Module] = {}
        for name, target in targets.items():
            layer = LoraLayer(target.module, target.rank, target.alpha, split_sizes=target.split_sizes)
            for variant in settings.variants:
                variant.extend_layer(layer)
            layers[name] = layer
        return layers

    def make_layer(self, module: LoraModule, path: str, factors: Factors, settings: Settings) -> "LoraLayer":
        """Return a LoRA layer with the rank and alpha of the factors in a file.

        If the settings split fused layers and the up factor is block-diagonal, each part has its own factors.
        """
        from networks.deltas import get_lora_rank  # torch
        from networks.kinds.composing import find_kinds_with_factors
        from networks.lora_layer import LoraLayer
        from networks.lora_products import diagonal_blocks

        rank = get_lora_rank(factors)
        assert rank is not None
        alpha = float(factors["alpha"])
        split_sizes = settings.split_sizes_of(path, module)
        if split_sizes and diagonal_blocks(factors[UP], split_sizes) is not None:
            num_parts = len(split_sizes)  # the file has their factors joined, with the sum of the ranks
            return LoraLayer(module, rank // num_parts, alpha / num_parts, split_sizes=split_sizes)
        layer = LoraLayer(module, rank, alpha)
        # such as DoRA, which adds magnitudes to the layer
        for kind in find_kinds_with_factors(factors):
            kind.extend_layer(layer)
        return layer


LORA = LoraKind()
