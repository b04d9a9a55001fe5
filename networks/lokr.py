"""LoKr for the Linear layers of a network's blocks: `--network_module networks.lokr`, for every family.

`--network_args factor=8` splits sizes into 8 and the rest (-1, the default: as equal as can be);
`decompose_both=True` gives the smaller matrix two factors too. A `--network_dim` of half the larger matrix's
side or more keeps that matrix whole.
"""

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from modules.errors import OptionError
from networks.factored import FactoredNetwork, MakeShapes, build_factored, check_factored, rebuild_factored
from networks.factored_layer import lokr_shapes

SWITCH = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}


def check_settings(
    rank: int | None,
    alpha: float | None,
    dropout: float | None,
    arguments: Mapping[str, Any],
    depths: Mapping[str, int] | None = None,
) -> None:
    """Raise OptionError if a setting cannot be used. Nothing of the model is needed.

    `depths` is not used: no setting has numbers of blocks.
    """
    rest = dict(arguments)
    choose_shapes(rest.pop("factor", -1), rest.pop("decompose_both", False))
    check_factored(rank, alpha, dropout, rest)


def choose_shapes(factor: Any, decompose_both: Any) -> MakeShapes:
    """Return what gives the factors of a module.

    Raises OptionError if `factor` or `decompose_both` cannot be used.
    """
    try:
        size = int(factor)
    except ValueError:
        size = 0
    if size < 1 and size != -1:
        raise OptionError(
            f"--network_args factor={factor}: give a whole number from 1, or -1 for equal parts"
        )
    if str(decompose_both) not in SWITCH:
        raise OptionError(f"--network_args decompose_both={decompose_both}: give True or False")
    return functools.partial(lokr_shapes, factor=size, decompose_both=SWITCH[str(decompose_both)])


def create_arch_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: object,
    text_encoders: object,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    factor: Any = -1,
    decompose_both: Any = False,
    **arguments: Any,
) -> FactoredNetwork:
    """Build a network by the call that LoRA tuners share. `vae` and `text_encoders` are not used."""
    shapes = choose_shapes(factor, decompose_both)
    return build_factored(unet, multiplier, network_dim, network_alpha, neuron_dropout, arguments, shapes)


def create_arch_network_from_weights(
    multiplier: float,
    weights_sd: Mapping[str, Tensor],
    text_encoders: object = None,
    unet: nn.Module | None = None,
    **_: Any,
) -> FactoredNetwork:
    """Build a network with the modules, factors and alphas of a file's tensors, but not their values."""
    return rebuild_factored(unet, multiplier, weights_sd, ("lokr_w1", "lokr_w1_a"))
