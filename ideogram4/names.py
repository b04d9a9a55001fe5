"""Ideogram 4's names: scripts, modules in LoRA files, and tensors that identify its files."""

from networks.names.layouts import FamilyNames, WeightPart, renamed_parts, stacked_parts, with_endings
from protocols.families import IMAGES, FamilyEntry, Marks

ENTRY = FamilyEntry(
    "ideogram4",
    script="ideogram4",
    cache="ideogram4_cache",
    record="Ideogram4",
    encoders=(("vae", "--vae", IMAGES),),
    texts="--text_encoder QWEN3_VL_FILE",
    notice="Ideogram 4's license, the Ideogram Non-Commercial Model Agreement, allows no commercial use of "
    "the model, nor of LoRAs and other models made from it.",
    captions="captions",
)
_BLOCK = "layers.{n}."
# in the order of registration
_LAYERS = "attention.qkv attention.o feed_forward.w1 feed_forward.w2 feed_forward.w3 adaln_modulation"
_NORMS = "attention.norm_q attention.norm_k attention_norm1 ffn_norm1 attention_norm2 ffn_norm2"
_OUTSIDE = (
    *("input_proj", "llm_cond_norm", "llm_cond_proj", "t_embedding.mlp_in", "t_embedding.mlp_out"),
    *("adaln_proj", "embed_image_indicator", "final_layer.linear", "final_layer.adaln_modulation"),
)
_SAME = tuple(
    (path, path)
    for path in (
        *with_endings(_BLOCK, "feed_forward.w1 feed_forward.w2 feed_forward.w3 adaln_modulation"),
        *with_endings(_BLOCK, _NORMS),
        *_OUTSIDE,
    )
)
# diffusers splits queries, keys and values
IDEOGRAM_4 = FamilyNames(
    "ideogram4",
    "Ideogram-4",
    parts=(
        *stacked_parts(f"{_BLOCK}attention.to_{{x}}", f"{_BLOCK}attention.qkv"),
        WeightPart(f"{_BLOCK}attention.to_out.0", f"{_BLOCK}attention.o"),
        *renamed_parts("", "", _SAME),
    ),
    # diffusers' converter stops at names with underscores
    converted_for="diffusers",
    more_diffusers_prefixes=("conditional_transformer.",),
    version_prefixes=("ideogram4", "ideogram-4", "ideogram_4", "ideogram 4"),
    relative_sizes=(
        (".attention.qkv", 3, 1),
        (".attention.o", 1, 1),
        (".feed_forward.w1", 8 / 3, 1),
        (".feed_forward.w2", 1, 8 / 3),
        (".feed_forward.w3", 8 / 3, 1),
    ),
    released_sizes=((4608, (("layers", 34),)),),
    optimizer_numbering=((_BLOCK, _LAYERS),),
    network_module="networks.lora_ideogram4",
)
LORA = (IDEOGRAM_4,)
MARKS: Marks = (("embed_image_indicator.weight", "an Ideogram 4 transformer (ideogram4_*.py, --dit)"),)
