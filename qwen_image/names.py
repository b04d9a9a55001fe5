"""Qwen-Image's names: scripts, modules in LoRA files, and tensors that identify its files."""

from networks.names import layouts
from networks.names.layouts import FamilyNames, with_endings
from protocols.families import IMAGES, FamilyEntry, Marks

ENTRY = FamilyEntry(
    "qwen_image",
    script="qwen_image",
    cache="qwen_image_cache",
    record="QwenImage",
    encoders=(("vae", "--vae", IMAGES),),
    texts="--text_encoder QWEN_FILE",
    further_models=("qwen_image_edit", "qwen_image_layered"),
    own_latents=("qwen_image_layered",),
)

# Qwen-Image, whose own layout is that of diffusers
QWEN_IMAGE = FamilyNames(
    "qwen_image",
    "Qwen-Image",
    more_modules=(
        *with_endings(
            "transformer_blocks.{n}.attn.",
            "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out",
        ),
        *with_endings("transformer_blocks.{n}.attn.", "norm_q norm_k norm_added_q norm_added_k"),
        *with_endings(
            "transformer_blocks.{n}.",
            "img_mod.1 txt_mod.1 img_mlp.net.0.proj img_mlp.net.2 txt_mlp.net.0.proj txt_mlp.net.2",
        ),
        *with_endings("", "img_in txt_in txt_norm norm_out.linear proj_out"),
        *with_endings("time_text_embed.timestep_embedder.", "linear_1 linear_2"),
    ),
    is_as_in_diffusers=True,
    version_prefixes=("qwen_image", "qwen-image", "qwenimage"),
    relative_sizes=(*layouts.IN_TWO_STREAMS, ("_mod.1", 6, 1)),
    released_sizes=((3072, (("transformer_blocks", 60),)),),
    optimizer_numbering=(
        (
            "transformer_blocks.{n}.",
            f"img_mod.1 {layouts.NUMBERED_ATTENTION} attn.to_add_out img_mlp.net.0.proj img_mlp.net.2 "
            "txt_mod.1 txt_mlp.net.0.proj txt_mlp.net.2",
        ),
    ),
    network_module="networks.lora_qwen_image",
)

LORA = (QWEN_IMAGE,)
MARKS: Marks = (
    (
        "time_text_embed.addition_t_embedding.weight",
        "the transformer of Qwen-Image-Layered (--dit, with --model_version layered)",
    ),
)
SHARED_MARKS: Marks = (("transformer_blocks.0.img_mod.1.weight", "a Qwen-Image transformer (--dit)"),)
