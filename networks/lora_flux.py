"""LoRA for FLUX.1 and Chroma, also for the modulation of blocks: `--network_module networks.lora_flux`."""

from networks.lora import module_of_family
from networks.lora_settings import LoraRules

_BLOCKS = ("double_blocks.", "single_blocks.")
RULES = LoraRules(
    targets=_BLOCKS,
    types=(
        *(
            (f"{stream}_{kind}_dim", ((f"{stream}_{kind}",),))
            for kind in ("attn", "mlp", "mod")
            for stream in ("img", "txt")
        ),
        ("single_dim", (("single_blocks", "linear"),)),
        ("single_mod_dim", (("single_blocks", "modulation"),)),
    ),
    choices={"all": _BLOCKS, "double": _BLOCKS[:1], "single": _BLOCKS[1:]},
    indices={"train_double_block_indices": "double_blocks", "train_single_block_indices": "single_blocks"},
    outside="in_dims",
    outside_paths=("img_in", "time_in", "vector_in", "guidance_in", "txt_in"),
    fused={"attn.qkv": 3, "linear1": 4},
    encoders={"train_t5xxl": "lora_te3"},
)
check_settings, create_arch_network, create_arch_network_from_weights = module_of_family(RULES)
