"""Build the layers of LoKrs."""

from collections.abc import Mapping

from torch import nn

from networks.factored_layer import FactoredLayer, MakeShapes
from networks.kinds import lokr
from networks.kinds.contract import KindTraining, LoraModule, Settings, Target
from networks.kinds.factors import Factors
from networks.kinds.lokr_layer import PRODUCT
from networks.train.factored import make_layer, make_layers


class LokrTraining(KindTraining):
    """Builds the layers of LoKrs."""

    kind = lokr.LOKR

    def make_layers(
        self, targets: Mapping[str, Target], settings: Settings, kind_arguments: MakeShapes
    ) -> dict[str, nn.Module]:
        """Return a trainable layer for each target module.

        `kind_arguments`, the result of `read_arguments`, computes factor shapes from the shape of a weight
        and the rank.
        """
        return make_layers(targets, kind_arguments, PRODUCT)

    def make_layer(
        self, module: LoraModule, path: str, factors: Factors, settings: Settings
    ) -> FactoredLayer:
        """Return a trainable layer for a module, with factors of the same shapes as in a file."""
        return make_layer(module, path, factors, PRODUCT)


LOKR = LokrTraining()
