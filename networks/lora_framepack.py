"""LoRA for FramePack: `--network_module networks.lora_framepack`."""

from networks.lora import LoraTargets, builder_for, create_arch_network_from_weights

__all__ = ["create_arch_network", "create_arch_network_from_weights"]

FRAMEPACK = LoraTargets(
    frozenset({"HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"}), r".*(norm).*"
)
create_arch_network = builder_for(FRAMEPACK)
