"""Module names of Lumina-Image-2.0 (NextDiT), as published, and in diffusers' layout."""

from networks.names.layouts import BEFORE_REST, REST, FamilyNames, WeightPart, each, renamed_parts

_BLOCKS = ("noise_refiner.{n}.", "context_refiner.{n}.", "layers.{n}.")
_DIFFUSERS_BLOCK = (
    ("attn.to_out.0", "attention.out"),
    *((f"attn.norm_{x}", f"attention.{x}_norm") for x in "qk"),
    *((f"feed_forward.linear_{number}", f"feed_forward.w{number}") for number in (1, 2, 3)),
    ("norm2", "attention_norm2"),
    *(("ffn_norm1", "ffn_norm1"), ("ffn_norm2", "ffn_norm2")),
)
_DIFFUSERS_MODULATED = (("norm1.linear", "adaLN_modulation.1"), ("norm1.norm", "attention_norm1"))
_DIFFUSERS_REST = (
    ("x_embedder", "x_embedder"),
    *(
        (f"time_caption_embed.timestep_embedder.linear_{number}", f"t_embedder.mlp.{layer}")
        for number, layer in ((1, 0), (2, 2))
    ),
    *((f"time_caption_embed.caption_embedder.{layer}", f"cap_embedder.{layer}") for layer in (0, 1)),
    *(("norm_out.linear_1", "final_layer.adaLN_modulation.1"), ("norm_out.linear_2", "final_layer.linear")),
)

LUMINA = FamilyNames(
    "lumina",
    "lumina-2",
    (
        *(
            module
            for block in _BLOCKS
            for module in each(
                block, "attention.qkv attention.out feed_forward.w1 feed_forward.w2 feed_forward.w3"
            )
        ),
        *each("", "noise_refiner.{n}.adaLN_modulation.1 layers.{n}.adaLN_modulation.1"),
        *each("", "x_embedder t_embedder.mlp.0 t_embedder.mlp.2 cap_embedder.0 cap_embedder.1"),
        *each("final_layer.", "linear adaLN_modulation.1"),
    ),
    parts=(
        # several queries share one key and value: k and v are the last rows, q all before them
        *(
            WeightPart(f"{block}attn.to_{x}", f"{block}attention.qkv", index, usual_height)
            for block in _BLOCKS
            for x, index, usual_height in (("q", 0, 3), ("k", BEFORE_REST, 1), ("v", REST, 1))
        ),
        *(part for block in _BLOCKS for part in renamed_parts(block, block, _DIFFUSERS_BLOCK)),
        *renamed_parts(_BLOCKS[0], _BLOCKS[0], _DIFFUSERS_MODULATED),
        *renamed_parts(_BLOCKS[1], _BLOCKS[1], (("norm1", "attention_norm1"),)),
        *renamed_parts(_BLOCKS[2], _BLOCKS[2], _DIFFUSERS_MODULATED),
        *renamed_parts("", "", _DIFFUSERS_REST),
    ),
    versions=("lumina2", "lumina-2", "lumina-image-2"),
)
