"""FramePack's names: scripts, modules in LoRA files, and tensors that identify its files."""

from hunyuan_model.names import HUNYUAN_VIDEO
from networks.names import layouts
from networks.names.layouts import FamilyNames, with_endings
from protocols.families import CLIPS, FamilyEntry, Marks

ENTRY = FamilyEntry(
    "frame_pack",
    script="fpack",
    cache="fpack_cache",
    makes="video",
    record="FramePack",
    encoders=(("vae", "--vae", CLIPS), ("image_encoder", "--image_encoder", "it encodes first frames")),
    texts="--text_encoder1 TEXT_ENCODER1_FILE --text_encoder2 TEXT_ENCODER2_FILE",
)

# whose own layout is that of diffusers
FRAMEPACK = FamilyNames(
    "framepack",
    "framepack",
    more_modules=(
        *(part.part_path for part in HUNYUAN_VIDEO.parts),
        *with_endings("clean_x_embedder.", "proj proj_2x proj_4x"),
        *with_endings("image_projection.", "up down"),
    ),
    compatible_families=("hunyuan_video",),
    # diffusers' HunyuanVideoFramepackPipeline only loads layers with this prefix
    path_prefix=layouts.IN_DIFFUSERS,
    converted_for="diffusers",
    not_in_comfyui="ComfyUI has no FramePack, so that it has no names for its layers",
    is_as_in_diffusers=True,
    relative_sizes=(
        *layouts.IN_TWO_STREAMS,
        (".norm1.linear", 6, 1),
        (".norm1_context.linear", 6, 1),
        (".norm.linear", 3, 1),
        (".proj_mlp", 4, 1),
        (".proj_out", 1, 5),
    ),
    released_sizes=((3072, (("transformer_blocks", 20), ("single_transformer_blocks", 40))),),
    optimizer_numbering=(
        (
            "transformer_blocks.{n}.",
            f"norm1.linear norm1_context.linear {layouts.NUMBERED_ATTENTION} attn.to_add_out ff.net.0.proj "
            "ff.net.2 ff_context.net.0.proj ff_context.net.2",
        ),
        ("single_transformer_blocks.{n}.", "attn.to_q attn.to_k attn.to_v norm.linear proj_mlp proj_out"),
    ),
    network_module="networks.lora_framepack",
)

LORA = (FRAMEPACK,)
MARKS: Marks = (
    ("clean_x_embedder.proj.weight", "a FramePack transformer (--dit)"),
    *(
        (mark, "a SigLIP image encoder (--image_encoder)")
        for mark in (
            "vision_model.head.probe",
            "vision_model.embeddings.patch_embedding.bias",  # CLIP's has none
            "embeddings.patch_embedding.bias",
            "head.probe",
        )
    ),
)
