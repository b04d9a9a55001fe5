"""LoRA for Wan: `networks.lora` under the name that LoRA tuners know: `--network_module
networks.lora_wan`.
"""

from networks.lora import check_settings, create_arch_network, create_arch_network_from_weights

__all__ = ["check_settings", "create_arch_network", "create_arch_network_from_weights"]
