"""Our network modules by name: their kinds, what families' arguments choose, and their settings."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modules.errors import OptionError
from networks.deltas import LORA
from networks.factored import MakeShapes, loha_shapes, lokr_shapes
from networks.lora_settings import LoraRules, LoraSettings, read_settings

_IN_BLOCKS = ("double_blocks.", "single_blocks.")
_REFINERS = ("context_refiner.", "noise_refiner.")
# FLUX.1 and Chroma
FLUX_RULES = LoraRules(
    types=(
        *(
            (f"{stream}_{kind}_dim", ((f"{stream}_{kind}",),))
            for kind in ("attn", "mlp", "mod")
            for stream in ("img", "txt")
        ),
        ("single_dim", (("single_blocks", "linear"),)),
        ("single_mod_dim", (("single_blocks", "modulation"),)),
    ),
    choices={"all": _IN_BLOCKS, "double": _IN_BLOCKS[:1], "single": _IN_BLOCKS[1:]},
    indices={"train_double_block_indices": "double_blocks", "train_single_block_indices": "single_blocks"},
    outside="in_dims",
    outside_paths=("img_in", "time_in", "vector_in", "guidance_in", "txt_in"),
    fused={"attn.qkv": 3, "linear1": 4},
    encoders={"train_t5xxl": "lora_te3"},
)
HUNYUAN_IMAGE_RULES = LoraRules(fused={"attn_qkv": 3, "linear1": 4})
LUMINA_RULES = LoraRules(
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


@dataclass(frozen=True)
class OwnModule:
    """One of our network modules: a LoRA, or a network of another kind."""

    rules: LoraRules | None = None  # a family's arguments that choose among what its `DitSpec` names
    kind: str = "LoRA"
    first: tuple[str, ...] = LORA[:1]  # each module of a file has one of these factors


OWN_MODULES = {
    "networks.lora": OwnModule(),
    "networks.loha": OwnModule(kind="LoHa", first=("hada_w1_a",)),
    "networks.lokr": OwnModule(kind="LoKr", first=("lokr_w1", "lokr_w1_a")),
    # plain LoRAs under the names that other LoRA tuners have
    **dict.fromkeys(
        (
            *("networks.lora_wan", "networks.lora_hunyuan", "networks.lora_framepack"),
            *("networks.lora_flux_2", "networks.lora_qwen_image", "networks.lora_zimage"),
            *("networks.lora_krea2", "networks.lora_ltx2"),
        ),
        OwnModule(),
    ),
    "networks.lora_flux": OwnModule(FLUX_RULES),
    "networks.lora_hunyuan_image": OwnModule(HUNYUAN_IMAGE_RULES),
    "networks.lora_lumina": OwnModule(LUMINA_RULES),
}
_SWITCH = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
# settings that go beside what a file says with --dim_from_weights
BESIDE_FILE = {
    *("rank_dropout", "module_dropout", "verbose", "split_qkv", "network_reg_lrs", "ggpo_sigma", "ggpo_beta"),
    *("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
}


def read_own(
    name: str, rank: int | None, alpha: float | None, dropout: float | None, arguments: Mapping[str, Any]
) -> tuple[LoraSettings, MakeShapes]:
    """Read the settings of one of our modules, and how a LoHa or LoKr makes its factors.

    Of a LoKr, `factor=8` splits sizes into 8 and the rest (-1, the default: as equal as can be);
    `decompose_both=True` gives the smaller matrix two factors too. A `--network_dim` of half the larger
    matrix's side or more keeps that matrix whole.
    Raises OptionError for a setting that is unknown or out of range, or that only LoRAs have.
    """
    own, rest = OWN_MODULES[name], dict(arguments)
    make_shapes: MakeShapes = loha_shapes
    if own.kind == "LoKr":
        factor, decompose_both = rest.pop("factor", -1), str(rest.pop("decompose_both", False))
        try:
            size = int(factor)
        except ValueError:
            size = 0
        if size < 1 and size != -1:
            raise OptionError(
                f"--network_args factor={factor}: give a whole number from 1, or -1 for equal parts"
            )
        if decompose_both not in _SWITCH:
            raise OptionError(f"--network_args decompose_both={decompose_both}: give True or False")
        decomposes = _SWITCH[decompose_both]
        make_shapes = functools.partial(lokr_shapes, factor=size, decompose_both=decomposes)
    settings = read_settings(rank, alpha, dropout, rest, own.rules)
    ratios = settings.loraplus_lr_ratio, settings.loraplus_encoder_ratio
    others = settings.dropouts, settings.decomposes, settings.reg_rates, settings.perturbation
    if own.kind != "LoRA" and (any(others) or any(ratio is not None for ratio in ratios)):
        raise OptionError(
            "--network_dropout, and rank_dropout, module_dropout, dora_wd, loraplus_..., network_reg_lrs and "
            "ggpo_... of --network_args, are for LoRAs only: leave them out, or use --network_module "
            "networks.lora"
        )
    return settings, make_shapes
