"""LoRA for HunyuanVideo and SkyReels V1: `networks.lora`, under a name like that of the other families."""

from networks.lora import check_settings, create_arch_network, create_arch_network_from_weights

__all__ = ["check_settings", "create_arch_network", "create_arch_network_from_weights"]
