"""LoRA for Lumina-Image-2.0: blocks, refiners and the last layer: `--network_module networks.lora_lumina`."""

from networks.lora import module_of_family
from networks.lora_settings import LoraRules

_REFINERS = ("context_refiner.", "noise_refiner.")
RULES = LoraRules(
    targets=(*_REFINERS, "layers.", "final_layer."),
    types=(
        ("attn_dim", (("attention",),)),
        ("mlp_dim", (("mlp",), ("feed_forward",))),
        ("mod_dim", (("modulation",),)),
        ("refiner_dim", (("refiner",),)),
    ),
    choices={
        "all": (*_REFINERS, "layers.", "final_layer."),
        "transformer": ("layers.",),
        "refiners": _REFINERS,
        "noise_refiner": _REFINERS[1:],
        "context_refiner": _REFINERS[:1],
    },
    outside="embedder_dims",
    outside_paths=("x_embedder", "t_embedder", "cap_embedder"),
    fused={"attention.qkv": 3},
)
check_settings, create_arch_network, create_arch_network_from_weights = module_of_family(RULES)
