"""LoRA for Wan: `--network_module networks.lora_wan`."""

from networks.lora import LoraTargets, builder_for, create_arch_network_from_weights

__all__ = ["create_arch_network", "create_arch_network_from_weights"]

WAN = LoraTargets(
    frozenset({"WanAttentionBlock"}),
    r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*",
)
create_arch_network = builder_for(WAN)
