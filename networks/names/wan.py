"""Module names of Wan2.1 and Wan2.2, and in diffusers' layout (Wan-AI/*-Diffusers)."""

from modules.contract.rules import HIGH_NOISE, LOW_NOISE
from networks.names.layouts import FamilyNames, each

_WAN_BLOCK = (
    *each("blocks.{n}.self_attn.", "q k v o norm_q norm_k"),
    *each("blocks.{n}.cross_attn.", "q k v o k_img v_img norm_q norm_k norm_k_img"),
    *each("blocks.{n}.", "ffn.0 ffn.2 norm3"),
)
_WAN_REST = (
    "patch_embedding",
    "time_projection.1",
    "head.head",
    "ref_conv",
    "img_emb.proj.0",
    "img_emb.proj.1",
    "img_emb.proj.3",
    "img_emb.proj.4",
)

_IMAGE_ATTENTION = (
    *each("blocks.{n}.cross_attn.", "k_img v_img norm_k_img"),
    *each("img_emb.proj.", "0 1 3 4"),
    "img_emb.emb_pos",
)

_DIFFUSERS_ATTENTION = (
    *(("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")),
    *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
)

WAN = FamilyNames(
    "wan",
    "wan2.1",
    (*_WAN_BLOCK, *_WAN_REST, *each("text_embedding.", "0 2"), *each("time_embedding.", "0 2")),
    # diffusers layout
    (
        *(
            (f"blocks.{{n}}.attn1.{theirs}", f"blocks.{{n}}.self_attn.{ours}")
            for theirs, ours in _DIFFUSERS_ATTENTION
        ),
        *(
            (f"blocks.{{n}}.attn2.{theirs}", f"blocks.{{n}}.cross_attn.{ours}")
            for theirs, ours in _DIFFUSERS_ATTENTION
        ),
        ("blocks.{n}.attn2.add_k_proj", "blocks.{n}.cross_attn.k_img"),
        ("blocks.{n}.attn2.add_v_proj", "blocks.{n}.cross_attn.v_img"),
        ("blocks.{n}.attn2.norm_added_k", "blocks.{n}.cross_attn.norm_k_img"),
        ("blocks.{n}.ffn.net.0.proj", "blocks.{n}.ffn.0"),
        ("blocks.{n}.ffn.net.2", "blocks.{n}.ffn.2"),
        ("blocks.{n}.norm2", "blocks.{n}.norm3"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
        ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
        ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
        ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
        ("proj_out", "head.head"),
    ),
    versions=("wan2", "wan-2", "wan_2"),
    experts=(("transformer", HIGH_NOISE), ("transformer_2", LOW_NOISE)),
    optional=_IMAGE_ATTENTION,
    optional_words="the attention to images of Wan2.1's image-to-video models",
    parameters=(
        ("blocks.{n}.scale_shift_table", "blocks.{n}.modulation"),
        ("scale_shift_table", "head.modulation"),
        ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ),
)
