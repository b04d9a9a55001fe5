"""LoHa for the Linear layers of a network's blocks: `--network_module networks.loha`, for every family."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from networks.factored import FactoredNetwork, build_factored, check_factored, rebuild_factored
from networks.factored_layer import loha_shapes


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
    check_factored(rank, alpha, dropout, arguments)


def create_arch_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: object,
    text_encoders: object,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **arguments: Any,
) -> FactoredNetwork:
    """Build a network by the call that LoRA tuners share. `vae` and `text_encoders` are not used."""
    return build_factored(
        unet, multiplier, network_dim, network_alpha, neuron_dropout, arguments, loha_shapes
    )


def create_arch_network_from_weights(
    multiplier: float,
    weights_sd: Mapping[str, Tensor],
    text_encoders: object = None,
    unet: nn.Module | None = None,
    **_: Any,
) -> FactoredNetwork:
    """Build a network with the modules, ranks and alphas of a file's tensors, but not their values."""
    return rebuild_factored(unet, multiplier, weights_sd, ("hada_w1_a",))
