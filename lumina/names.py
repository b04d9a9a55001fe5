"""Lumina-Image-2.0's names: scripts, modules in LoRA files, and tensors that identify its files."""

from networks.names import layouts
from networks.names.layouts import FamilyNames, LoraRules, Sides, WeightPart, renamed_parts
from protocols.families import IMAGES, FamilyEntry, Marks

ENTRY = FamilyEntry(
    "lumina",
    script="lumina",
    cache="lumina_cache",
    record="Lumina",
    encoders=(("vae", "--ae", IMAGES),),
    texts="--gemma2 GEMMA2_FILE",
    same_latents="flux",
)

# Lumina-Image-2.0 (NextDiT)
LUMINA_BLOCKS = ("noise_refiner.{n}.", "context_refiner.{n}.", "layers.{n}.")
_LUMINA_BLOCK = (
    ("attn.to_out.0", "attention.out"),
    *((f"attn.norm_{x}", f"attention.{x}_norm") for x in "qk"),
    *((f"feed_forward.linear_{number}", f"feed_forward.w{number}") for number in (1, 2, 3)),
    ("norm2", "attention_norm2"),
    ("ffn_norm1", "ffn_norm1"),
    ("ffn_norm2", "ffn_norm2"),
)
_LUMINA_MODULATED = (("norm1.linear", "adaLN_modulation.1"), ("norm1.norm", "attention_norm1"))
LUMINA_SIDES: Sides = ((".w1", 0, 1), (".w2", 1, 0), (".w3", 0, 1))
_LUMINA_REST = (
    ("x_embedder", "x_embedder"),
    *(
        (f"time_caption_embed.timestep_embedder.linear_{number}", f"t_embedder.mlp.{layer}")
        for number, layer in ((1, 0), (2, 2))
    ),
    *((f"time_caption_embed.caption_embedder.{layer}", f"cap_embedder.{layer}") for layer in (0, 1)),
    ("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
    ("norm_out.linear_2", "final_layer.linear"),
)

_REFINERS = ("context_refiner.", "noise_refiner.")
_RULES = LoraRules(
    rank_arguments=(
        ("attn_dim", (("attention",),)),
        ("mlp_dim", (("mlp",), ("feed_forward",))),
        ("mod_dim", (("modulation",),)),
        ("refiner_dim", (("refiner",),)),
    ),
    train_blocks_choices={
        "all": (*_REFINERS, "layers.", "final_layer."),
        "transformer": ("layers.",),
        "refiners": _REFINERS,
        "noise_refiner": _REFINERS[1:],
        "context_refiner": _REFINERS[:1],
    },
    outside_ranks_argument="embedder_dims",
    outside_paths=("x_embedder", "t_embedder", "cap_embedder"),
    num_fused_parts={"attention.qkv": 3},
)

LUMINA = FamilyNames(
    "lumina",
    "lumina-2",
    parts=(
        # several queries share one key and value: k and v are the last rows, q all before them
        *(
            WeightPart(f"{block}attn.to_{x}", f"{block}attention.qkv", index, relative_rows)
            for block in LUMINA_BLOCKS
            for x, index, relative_rows in (
                ("q", 0, 3),
                ("k", layouts.BEFORE_REST, 1),
                ("v", layouts.REST, 1),
            )
        ),
        *(part for block in LUMINA_BLOCKS for part in renamed_parts(block, block, _LUMINA_BLOCK)),
        *renamed_parts(LUMINA_BLOCKS[0], LUMINA_BLOCKS[0], _LUMINA_MODULATED),
        WeightPart(f"{LUMINA_BLOCKS[1]}norm1", f"{LUMINA_BLOCKS[1]}attention_norm1"),
        *renamed_parts(LUMINA_BLOCKS[2], LUMINA_BLOCKS[2], _LUMINA_MODULATED),
        *renamed_parts("", "", _LUMINA_REST),
    ),
    version_prefixes=("lumina2", "lumina-2", "lumina-image-2"),
    encoders=(("lora_te", layouts.LANGUAGE_MODEL_LAYER_PREFIX),),
    texts_in_comfyui=(("lora_te_", "text_encoders.gemma2_2b.transformer.model."),),
    relative_sizes=((".qkv", 5 / 3, 1), (".out", 1, 1), *LUMINA_SIDES),
    released_sizes=((2304, (("layers", 26),)),),
    optimizer_numbering=(
        *(
            (
                f"{name}.{{n}}.",
                "attention.qkv attention.out "
                "feed_forward.w1 feed_forward.w2 feed_forward.w3 adaLN_modulation.1",
            )
            for name in ("context_refiner", "noise_refiner", "layers")
        ),
        ("final_layer.", "linear adaLN_modulation.1"),
        ("", "x_embedder"),
        ("t_embedder.", "mlp.0 mlp.2"),
        ("cap_embedder.", "1"),
    ),
    network_module="networks.lora_lumina",
    rules=_RULES,
)

LORA = (LUMINA,)
MARKS: Marks = (("context_refiner.0.attn.to_q.weight", "a Lumina-Image-2.0 transformer in diffusers layout"),)
SHARED_MARKS: Marks = (("context_refiner.0.attention.qkv.weight", "a Lumina-Image-2.0 transformer"),)
