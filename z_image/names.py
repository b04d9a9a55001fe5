"""Z-Image's names: scripts, modules in LoRA files, and tensors that identify its files."""

from lumina.names import LUMINA_BLOCKS, LUMINA_SIDES
from networks.names.layouts import FamilyNames, stacked_parts, with_endings
from protocols.families import IMAGES, FamilyEntry, Marks

ENTRY = FamilyEntry(
    "z_image",
    script="zimage",
    cache="zimage_cache",
    record="ZImage",
    encoders=(("vae", "--vae", IMAGES),),
    texts="--text_encoder QWEN3_FILE",
    same_latents="flux",
)

# Z-Image, whose own layout is that of diffusers; ComfyUI has queries, keys and values in one
Z_IMAGE = FamilyNames(
    "z_image",
    "Z-Image",
    (
        *(
            (f"{block}attention.{theirs}", f"{block}attention.{ours}")
            for block in LUMINA_BLOCKS
            for theirs, ours in (("out", "to_out.0"), ("q_norm", "norm_q"), ("k_norm", "norm_k"))
        ),
        ("x_embedder", "all_x_embedder.2-1"),
        *(
            (f"final_layer.{part}", f"all_final_layer.2-1.{part}")
            for part in ("linear", "adaLN_modulation.1")
        ),
    ),
    joined=tuple(
        part
        for block in LUMINA_BLOCKS
        for part in stacked_parts(f"{block}attention.to_{{x}}", f"{block}attention.qkv")
    ),
    more_modules=(
        *(
            path
            for block in LUMINA_BLOCKS
            for path in with_endings(
                block,
                "attention.to_q attention.to_k attention.to_v feed_forward.w1 feed_forward.w2 "
                "feed_forward.w3 attention_norm1 attention_norm2 ffn_norm1 ffn_norm2",
            )
        ),
        *(f"{block}adaLN_modulation.0" for block in (LUMINA_BLOCKS[0], LUMINA_BLOCKS[2])),
        *with_endings("", "t_embedder.mlp.0 t_embedder.mlp.2 cap_embedder.0 cap_embedder.1"),
    ),
    converted_for="ComfyUI",
    kinds_in_diffusers=("LoKr",),
    is_as_in_diffusers=True,
    version_prefixes=("z_image", "z-image", "zimage"),
    relative_sizes=((".qkv", 3, 1), *((f".to_{x}", 1, 1) for x in ("q", "k", "v", "out.0")), *LUMINA_SIDES),
    released_sizes=((3840, (("layers", 30),)),),
    optimizer_numbering=tuple(
        (
            block,
            "attention.to_q attention.to_k attention.to_v attention.to_out.0 "
            "feed_forward.w1 feed_forward.w2 feed_forward.w3 adaLN_modulation.0",
        )
        for block in LUMINA_BLOCKS
    ),
    network_module="networks.lora_zimage",
)

LORA = (Z_IMAGE,)
MARKS: Marks = (
    (
        "control_all_x_embedder.2-1.weight",
        "a ControlNet of Z-Image, such as Z-Image-Turbo-Fun-Controlnet-Union, which is not supported yet",
    ),
    ("control_layers.0.before_proj.weight", "a ControlNet of Z-Image, which is not supported yet"),
    ("cap_pad_token", "a Z-Image transformer (--dit)"),
)
