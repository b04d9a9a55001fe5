"""LoRA for HunyuanImage-2.1, whose blocks' modulation it takes too: `--network_module
networks.lora_hunyuan_image`.
"""

from networks.lora import module_of_family
from networks.lora_settings import LoraRules

RULES = LoraRules(targets=("double_blocks.", "single_blocks."), fused={"attn_qkv": 3, "linear1": 4})
check_settings, create_arch_network, create_arch_network_from_weights = module_of_family(RULES)
