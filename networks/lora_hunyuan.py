"""LoRA for HunyuanVideo and SkyReels V1: `--network_module networks.lora`, the name that LoRA tuners know it by."""

from typing import Any

from torch import nn

from networks.lora import LoraNetwork, LoraTargets, build_network, create_arch_network_from_weights

__all__ = ["create_arch_network", "create_arch_network_from_weights"]

HUNYUAN_VIDEO = LoraTargets(frozenset({"MMDoubleStreamBlock", "MMSingleStreamBlock"}), r".*(img_mod|txt_mod|modulation).*")


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
    """A network for HunyuanVideo, in the call that LoRA tuners share. `vae` and `text_encoders` are not used."""
    return build_network(HUNYUAN_VIDEO, multiplier, network_dim, network_alpha, unet, neuron_dropout, arguments)
