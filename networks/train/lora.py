"""Build the layers of LoRAs, which other kinds may extend, and find what trains a kind."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from networks.kinds import lora
from networks.kinds.composing import find_kinds_with_factors
from networks.kinds.contract import KindTraining, LoraModule, NetworkKind, Settings, Target
from networks.kinds.factors import UP, Factors
from networks.lora_layer import LoraLayer
from networks.lora_products import diagonal_blocks
from networks.module_factors import get_lora_rank
from networks.train import TRAININGS


class LoraTraining(KindTraining):
    """Builds the layers of LoRAs."""

    kind = lora.LORA

    def check_settings(self, settings: Settings, has_lora_arguments: bool) -> None:
        """Accept all settings: they are those of a LoRA."""

    def make_layers(
        self, targets: Mapping[str, Target], settings: Settings, kind_arguments: Any
    ) -> dict[str, nn.Module]:
        """Return a trainable layer for each target, extended by the settings' variants, such as DoRA."""
        layers: dict[str, nn.Module] = {}
        for name, target in targets.items():
            layer = LoraLayer(target.module, target.rank, target.alpha, split_sizes=target.split_sizes)
            for variant in settings.variants:
                find_training(variant).extend_layer(layer)
            layers[name] = layer
        return layers

    def make_layer(self, module: LoraModule, path: str, factors: Factors, settings: Settings) -> LoraLayer:
        """Return a LoRA layer with the rank and alpha of the factors in a file.

        If the settings split fused layers and the up factor is block-diagonal, each part has its own factors.
        """
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
            find_training(kind).extend_layer(layer)
        return layer


_BY_KIND = {training.kind.name: training for training in (LoraTraining(), *TRAININGS)}


def find_training(kind: NetworkKind) -> KindTraining:
    """Return what builds the layers of a kind; for one that changes no layers, what does nothing."""
    return _BY_KIND.get(kind.name) or kind.load_training() or KindTraining()
