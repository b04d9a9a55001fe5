"""LoRA for Wan: `--network_module networks.lora_wan`."""

from typing import Any

from torch import nn

from networks.lora import LoraNetwork, LoraTargets, build_network, create_arch_network_from_weights

__all__ = ["create_arch_network", "create_arch_network_from_weights"]

WAN = LoraTargets(
    frozenset({"WanAttentionBlock"}),
    r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*",
)


def create_arch_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: object,
    text_encoders: object,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **arguments: Any,
) -> LoraNetwork:
    """A network for Wan, in the call that LoRA tuners share. `vae` and `text_encoders` are not used."""
    return build_network(WAN, multiplier, network_dim, network_alpha, unet, neuron_dropout, arguments)
