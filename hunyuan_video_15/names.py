"""HunyuanVideo 1.5's names: scripts, modules in LoRA files, and tensors that identify its files."""

from hunyuan_model.names import DIFFUSERS_DOUBLE, DIFFUSERS_REFINER, DIFFUSERS_TEXT
from networks.names.layouts import (
    SWAPPED,
    FamilyNames,
    WeightPart,
    in_both_streams,
    renamed_parts,
    stacked_parts,
)
from protocols.families import FamilyEntry, Marks

ENTRY = FamilyEntry(
    "hunyuan_video_15",
    script="hv_1_5",
    cache="hv_1_5_cache",
    makes="video",
    record="HunyuanVideo15",
    texts="--text_encoder QWEN_FILE --byt5 BYT5_FILE",
)
_BLOCK, _REFINER = "double_blocks.{n}.", "txt_in.individual_token_refiner.blocks.{n}."
_IN_DIFFUSERS, _REFINER_IN_DIFFUSERS = (
    "transformer_blocks.{n}.",
    "context_embedder.token_refiner.refiner_blocks.{n}.",
)
_REST_IN_DIFFUSERS = (
    ("x_embedder.proj", "img_in.proj"),
    ("time_embed.timestep_embedder.linear_1", "time_in.mlp.0"),
    ("time_embed.timestep_embedder.linear_2", "time_in.mlp.2"),
    ("image_embedder.norm_in", "vision_in.proj.0"),
    ("image_embedder.linear_1", "vision_in.proj.1"),
    ("image_embedder.linear_2", "vision_in.proj.3"),
    ("image_embedder.norm_out", "vision_in.proj.4"),
    ("context_embedder_2.norm", "byt5_in.layernorm"),
    *((f"context_embedder_2.linear_{number}", f"byt5_in.fc{number}") for number in (1, 2, 3)),
    ("cond_type_embed", "cond_type_embedding"),
    ("proj_out", "final_layer.linear"),
)
# names of ComfyUI's converted LoRAs, where they differ in more than "." for "_"
_IN_COMFYUI = tuple(
    (f"{_BLOCK}{stream}_{theirs}", f"{_BLOCK}{stream}_{ours}")
    for stream in ("img", "txt")
    for theirs, ours in (("mod.lin", "mod.linear"), ("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2"))
)

# our names are the released ones, with queries, keys and values apart; diffusers only renames the blocks'
# modules, and ComfyUI fuses queries, keys and values
HUNYUAN_VIDEO_15 = FamilyNames(
    "hunyuan_video_1_5",
    "hunyuan-video-1.5",
    _IN_COMFYUI,
    parts=(
        *(
            part
            for theirs, ours in (("attn.to_{x}", "img_attn_{x}"), ("attn.add_{x}_proj", "txt_attn_{x}"))
            for part in renamed_parts(
                _IN_DIFFUSERS,
                _BLOCK,
                ((theirs.replace("{x}", x), ours.replace("{x}", x)) for x in "qkv"),
            )
        ),
        *renamed_parts(_IN_DIFFUSERS, _BLOCK, DIFFUSERS_DOUBLE),
        *stacked_parts(f"{_REFINER_IN_DIFFUSERS}attn.to_{{x}}", f"{_REFINER}self_attn_qkv"),
        *renamed_parts(
            _REFINER_IN_DIFFUSERS,
            _REFINER,
            (*DIFFUSERS_REFINER, ("norm1", "norm1"), ("norm2", "norm2")),
        ),
        *renamed_parts("context_embedder.", "txt_in.", DIFFUSERS_TEXT),
        WeightPart("norm_out.linear", "final_layer.adaLN_modulation.1", SWAPPED),
        *renamed_parts("", "", _REST_IN_DIFFUSERS),
    ),
    joined=tuple(
        part
        for stream in ("img", "txt")
        for part in stacked_parts(f"{_BLOCK}{stream}_attn_{{x}}", f"{_BLOCK}{stream}_attn_qkv")
    ),
    stacked_in_comfyui=True,
    underscored_in_comfyui=True,
    converted_for="ComfyUI",
    version_prefixes=("hunyuan_video_1_5", "hunyuan-video-1.5", "hunyuanvideo-1.5", "hunyuanvideo1.5"),
    relative_sizes=(
        ("_attn_qkv", 3, 1),
        *((f"_attn_{name}", 1, 1) for name in ("q", "k", "v", "proj")),
        ("mlp.fc1", 4, 1),
        ("mlp.fc2", 1, 4),
        ("_mod.linear", 6, 1),
    ),
    released_sizes=((2048, (("double_blocks", 54),)),),
    optimizer_numbering=(
        (
            _BLOCK,
            in_both_streams(
                "{x}_mod.linear {x}_attn_q {x}_attn_k {x}_attn_v {x}_attn_proj {x}_mlp.fc1 {x}_mlp.fc2"
            ),
        ),
    ),
    network_module="networks.lora_hv_1_5",
)
LORA = (HUNYUAN_VIDEO_15,)
_WHAT = "a HunyuanVideo 1.5 transformer (hv_1_5_*.py, --dit)"
MARKS: Marks = (
    ("cond_type_embedding.weight", _WHAT),
    ("cond_type_embed.weight", _WHAT),
    ("encoder.mid.attn_1.norm.gamma", "the VAE of HunyuanVideo 1.5 (hv_1_5_*.py, --vae)"),
    ("encoder.mid_block.attentions.0.proj_out.weight", "the VAE of HunyuanVideo 1.5 (hv_1_5_*.py, --vae)"),
)
