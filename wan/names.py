"""Wan's names: scripts, modules in LoRA files, and tensors that identify its files."""

from networks.names.layouts import FamilyNames
from protocols.families import HIGH_NOISE, LOW_NOISE, FamilyEntry, Marks

ENTRY = FamilyEntry(
    "wan",
    script="wan",
    cache="wan_cache",
    makes="video",
    record="Wan",
    texts="--t5 T5_FILE",
)

_IMAGE_ATTENTION = (
    "blocks.{n}.cross_attn.k_img",
    "blocks.{n}.cross_attn.v_img",
    "blocks.{n}.cross_attn.norm_k_img",
    "img_emb.proj.0",
    "img_emb.proj.1",
    "img_emb.proj.3",
    "img_emb.proj.4",
    "img_emb.emb_pos",
)

_DIFFUSERS_ATTENTION = (
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "o"),
    ("norm_q", "norm_q"),
    ("norm_k", "norm_k"),
)

# names inside a block: (in diffusers, ours)
_BLOCK = (
    *(
        (f"{diffusers}.{theirs}", f"{official}.{ours}")
        for diffusers, official in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for theirs, ours in _DIFFUSERS_ATTENTION
    ),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("norm2", "norm3"),
)

WAN = FamilyNames(
    "wan",
    "wan2.1",
    # diffusers layout
    (
        *(
            (f"{blocks}.{{n}}.{theirs}", f"{blocks}.{{n}}.{ours}")
            for blocks in ("blocks", "vace_blocks")
            for theirs, ours in _BLOCK
        ),
        ("vace_blocks.{n}.proj_in", "vace_blocks.{n}.before_proj"),
        ("vace_blocks.{n}.proj_out", "vace_blocks.{n}.after_proj"),
        ("blocks.{n}.attn2.add_k_proj", "blocks.{n}.cross_attn.k_img"),
        ("blocks.{n}.attn2.add_v_proj", "blocks.{n}.cross_attn.v_img"),
        ("blocks.{n}.attn2.norm_added_k", "blocks.{n}.cross_attn.norm_k_img"),
        *(
            (f"condition_embedder.{what}_embedder.linear_{number}", f"{what}_embedding.{layer}")
            for what in ("text", "time")
            for number, layer in ((1, 0), (2, 2))
        ),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
        ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
        ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
        ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
        ("proj_out", "head.head"),
    ),
    more_modules=("patch_embedding", "ref_conv", "vace_patch_embedding"),
    version_prefixes=("wan2", "wan-2", "wan_2"),
    experts=(("transformer", HIGH_NOISE), ("transformer_2", LOW_NOISE)),
    more_experts=(
        ("transformer_1", HIGH_NOISE),  # ai-toolkit
        *((f"high_noise{end}", HIGH_NOISE) for end in ("_model", "")),  # folders of the release
        *((f"low_noise{end}", LOW_NOISE) for end in ("_model", "")),
    ),
    optional_paths=_IMAGE_ATTENTION,
    optional_description="the attention to images of Wan2.1's image-to-video models",
    parameters=(
        ("blocks.{n}.scale_shift_table", "blocks.{n}.modulation"),
        ("vace_blocks.{n}.scale_shift_table", "vace_blocks.{n}.modulation"),
        ("scale_shift_table", "head.modulation"),
        ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ),
    optimizer_numbering=(
        (
            "blocks.{n}.",
            "self_attn.q self_attn.k self_attn.v self_attn.o cross_attn.q cross_attn.k cross_attn.v "
            "cross_attn.o cross_attn.k_img cross_attn.v_img ffn.0 ffn.2",
        ),
    ),
    network_module="networks.lora_wan",
)

LORA = (WAN,)
MARKS: Marks = (
    (
        "decoder.upsamples.0.upsamples.0.residual.2.weight",
        "the VAE of Wan2.2 TI2V-5B, of 48 channels (--vae)",
    ),
    ("decoder.upsamples.0.residual.2.weight", "a Wan2.1 VAE (--vae)"),
    ("encoder.down_blocks.0.norm1.gamma", "a Wan2.1 VAE in diffusers layout (--vae)"),
    ("blocks.0.self_attn.q.weight", "a Wan transformer (--dit)"),
    ("blocks.0.attn1.to_q.weight", "a Wan transformer in diffusers layout (--dit)"),
    ("vace_patch_embedding.weight", "the blocks of VACE alone (--vace, next to a T2V --dit of Wan)"),
    ("blocks.0.pos_embedding.embedding.weight", "an umT5 encoder (--t5)"),
    ("visual.cls_embedding", "a CLIP image encoder (--clip)"),
)
# Qwen-Image-2.1's VAE has it too
SHARED_MARKS: Marks = (
    (
        "encoder.down_blocks.0.downsampler.resample.1.weight",
        "the VAE of Wan2.2 TI2V-5B in diffusers layout (--vae)",
    ),
)
