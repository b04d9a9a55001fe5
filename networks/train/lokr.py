"""Build the layers of LoKrs."""

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from modules.errors import OptionError
from networks.factored_layer import FactoredLayer, MakeShapes
from networks.kinds import lokr
from networks.kinds.contract import KindTraining, LoraModule, Settings, Target
from networks.kinds.factors import Factors
from networks.kinds.lokr_layer import PRODUCT
from networks.train.factored import make_layer, make_layers

_BOOLEANS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}


class LokrTraining(KindTraining):
    """Builds the layers of LoKrs."""

    kind = lokr.LOKR

    def read_arguments(self, arguments: dict[str, Any]) -> MakeShapes:
        """Remove LoKr's arguments; return a function that computes the shapes of factors.

        `factor=8` splits each axis into 8 and the quotient; the default -1 makes both as equal as possible.
        With `decompose_both=True`, the small matrix is stored as two factors too.

        Raises:
            OptionError: If the value of an argument is invalid.
        """
        factor_text = arguments.pop("factor", -1)
        decompose_both = str(arguments.pop("decompose_both", False))
        try:
            factor = int(factor_text)
        except ValueError:
            factor = 0  # invalid, for the error below
        if factor < 1 and factor != -1:
            raise OptionError(
                f"--network_args factor={factor_text}: use a whole number from 1, or -1 for equal parts"
            )
        if decompose_both not in _BOOLEANS:
            raise OptionError(f"--network_args decompose_both={decompose_both}: pass True or False")
        return functools.partial(lokr.make_shapes, factor=factor, decompose_both=_BOOLEANS[decompose_both])

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
