"""LoRA for HunyuanVideo and SkyReels V1: `--network_module networks.lora`, the name that LoRA tuners use."""

from networks.lora import LoraTargets, builder_for, create_arch_network_from_weights

__all__ = ["create_arch_network", "create_arch_network_from_weights"]

HUNYUAN_VIDEO = LoraTargets(
    frozenset({"MMDoubleStreamBlock", "MMSingleStreamBlock"}), r".*(img_mod|txt_mod|modulation).*"
)
create_arch_network = builder_for(HUNYUAN_VIDEO)
