"""Build the layers of LoHas."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from networks.factored_layer import FactoredLayer
from networks.kinds import loha
from networks.kinds.contract import KindTraining, LoraModule, Settings, Target
from networks.kinds.factors import Factors
from networks.kinds.loha_layer import PRODUCT
from networks.train.factored import make_layer, make_layers


class LohaTraining(KindTraining):
    """Builds the layers of LoHas."""

    kind = loha.LOHA

    def make_layers(
        self, targets: Mapping[str, Target], settings: Settings, kind_arguments: Any
    ) -> dict[str, nn.Module]:
        """Return a trainable layer for each target module."""
        return make_layers(targets, loha.make_shapes, PRODUCT)

    def make_layer(
        self, module: LoraModule, path: str, factors: Factors, settings: Settings
    ) -> FactoredLayer:
        """Return a trainable layer for a module, with factors of the same shapes as in a file."""
        return make_layer(module, path, factors, PRODUCT)


LOHA = LohaTraining()
