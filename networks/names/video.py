"""Module names of the video models, as published or in ComfyUI's layout, and in diffusers' layout."""

import re

from modules.contract.rules import HIGH_NOISE, LOW_NOISE
from networks.names import layouts
from networks.names.layouts import FamilyNames, Sides, WeightPart, each, renamed_parts, stacked_parts

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
    # diffusers layout
    (
        *(
            (f"blocks.{{n}}.{there}.{theirs}", f"blocks.{{n}}.{here}.{ours}")
            for there, here in (("attn1", "self_attn"), ("attn2", "cross_attn"))
            for theirs, ours in _DIFFUSERS_ATTENTION
        ),
        ("blocks.{n}.attn2.add_k_proj", "blocks.{n}.cross_attn.k_img"),
        ("blocks.{n}.attn2.add_v_proj", "blocks.{n}.cross_attn.v_img"),
        ("blocks.{n}.attn2.norm_added_k", "blocks.{n}.cross_attn.norm_k_img"),
        ("blocks.{n}.ffn.net.0.proj", "blocks.{n}.ffn.0"),
        ("blocks.{n}.ffn.net.2", "blocks.{n}.ffn.2"),
        ("blocks.{n}.norm2", "blocks.{n}.norm3"),
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
    further=("patch_embedding", "ref_conv"),
    versions=("wan2", "wan-2", "wan_2"),
    experts=(("transformer", HIGH_NOISE), ("transformer_2", LOW_NOISE)),
    more_experts=(
        ("transformer_1", HIGH_NOISE),  # ai-toolkit
        *((f"high_noise{end}", HIGH_NOISE) for end in ("_model", "")),  # folders of the release
        *((f"low_noise{end}", LOW_NOISE) for end in ("_model", "")),
    ),
    optional=_IMAGE_ATTENTION,
    optional_words="the attention to images of Wan2.1's image-to-video models",
    parameters=(
        ("blocks.{n}.scale_shift_table", "blocks.{n}.modulation"),
        ("scale_shift_table", "head.modulation"),
        ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ),
)

# HunyuanVideo and SkyReels V1. `BLOCK_...`: of its blocks and its text refiner, which HunyuanImage has too
_DIFFUSERS_DOUBLE = (
    *(("norm1.linear", "img_mod.linear"), ("norm1_context.linear", "txt_mod.linear")),
    *(("attn.to_out.0", "img_attn_proj"), ("attn.to_add_out", "txt_attn_proj")),
    *(("attn.norm_q", "img_attn_q_norm"), ("attn.norm_k", "img_attn_k_norm")),
    *(("attn.norm_added_q", "txt_attn_q_norm"), ("attn.norm_added_k", "txt_attn_k_norm")),
    *(("ff.net.0.proj", "img_mlp.fc1"), ("ff.net.2", "img_mlp.fc2")),
    *(("ff_context.net.0.proj", "txt_mlp.fc1"), ("ff_context.net.2", "txt_mlp.fc2")),
)
_DIFFUSERS_SINGLE = (
    *(("proj_out", "linear2"), ("norm.linear", "modulation.linear")),
    *(("attn.norm_q", "q_norm"), ("attn.norm_k", "k_norm")),
)
_DIFFUSERS_REFINER = (
    *(("attn.to_out.0", "self_attn_proj"), ("norm_out.linear", "adaLN_modulation.1")),
    *(("ff.net.0.proj", "mlp.fc1"), ("ff.net.2", "mlp.fc2")),
)
_DIFFUSERS_TEXT = (
    ("proj_in", "input_embedder"),
    ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_text_embed.text_embedder.linear_1", "c_embedder.linear_1"),
    ("time_text_embed.text_embedder.linear_2", "c_embedder.linear_2"),
)
_VECTORS = (
    ("timestep", "time_in.mlp.0", "time_in.mlp.2"),
    ("guidance", "guidance_in.mlp.0", "guidance_in.mlp.2"),
)
_DIFFUSERS_REST = (
    ("x_embedder.proj", "img_in.proj"),
    ("proj_out", "final_layer.linear"),
    *(
        (f"time_text_embed.{vector}_embedder.linear_{number}", ours)
        for vector, *both in (*_VECTORS, ("text", "vector_in.in_layer", "vector_in.out_layer"))
        for number, ours in enumerate(both, 1)
    ),
)

# ComfyUI's names where they differ in more than "." for "_"
_REFINER = "txt_in.individual_token_refiner.blocks.{n}"
BLOCK_ALIASES = (
    *(
        (f"{mlp}.{theirs}", f"{mlp}.{ours}")
        for mlp in ("double_blocks.{n}.img_mlp", "double_blocks.{n}.txt_mlp", f"{_REFINER}.mlp")
        for theirs, ours in (("0", "fc1"), ("2", "fc2"))
    ),
    *(
        (f"{name}.lin", f"{name}.linear")
        for name in ("double_blocks.{n}.img_mod", "double_blocks.{n}.txt_mod", "single_blocks.{n}.modulation")
    ),
    ("txt_in.c_embedder.in_layer", "txt_in.c_embedder.linear_1"),
    ("txt_in.c_embedder.out_layer", "txt_in.c_embedder.linear_2"),
    *((f"{name}.in_layer", f"{name}.mlp.0") for name in ("txt_in.t_embedder", "time_in", "guidance_in")),
    *((f"{name}.out_layer", f"{name}.mlp.2") for name in ("txt_in.t_embedder", "time_in", "guidance_in")),
)
# diffusers layout; FLUX.1's single blocks have the first of them too
_LINEAR1 = "single_blocks.{n}.linear1"
LINEAR1_PARTS = (
    *stacked_parts("single_transformer_blocks.{n}.attn.to_{x}", _LINEAR1),
    WeightPart("single_transformer_blocks.{n}.proj_mlp", _LINEAR1, layouts.REST, usual_height=4),
)
BLOCK_PARTS = (
    *stacked_parts("transformer_blocks.{n}.attn.to_{x}", "double_blocks.{n}.img_attn_qkv"),
    *stacked_parts("transformer_blocks.{n}.attn.add_{x}_proj", "double_blocks.{n}.txt_attn_qkv"),
    *renamed_parts("transformer_blocks.{n}.", "double_blocks.{n}.", _DIFFUSERS_DOUBLE),
    *LINEAR1_PARTS,
    *renamed_parts("single_transformer_blocks.{n}.", "single_blocks.{n}.", _DIFFUSERS_SINGLE),
    *stacked_parts(
        "context_embedder.token_refiner.refiner_blocks.{n}.attn.to_{x}",
        "txt_in.individual_token_refiner.blocks.{n}.self_attn_qkv",
    ),
    *renamed_parts(
        "context_embedder.token_refiner.refiner_blocks.{n}.",
        "txt_in.individual_token_refiner.blocks.{n}.",
        _DIFFUSERS_REFINER,
    ),
    *renamed_parts("context_embedder.", "txt_in.", _DIFFUSERS_TEXT),
    WeightPart("norm_out.linear", "final_layer.adaLN_modulation.1", layouts.SWAPPED),
)
BLOCK_SIDES: Sides = (
    *(("_attn_qkv", 3, 1), ("_attn_proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)),
    *(("_mod.linear", 6, 1), (".modulation.linear", 3, 1), (".linear1", 7, 1), (".linear2", 1, 5)),
)
BLOCK_DEPTHS = (("double_blocks", 20), ("single_blocks", 40))
# tensors of a whole model as ComfyUI repackages it -> the published ones. Source: files of Comfy-Org.
COMFYUI_TENSORS = (
    (r"(time_in|guidance_in|txt_in\.t_embedder)\.in_layer\.(\w+)", r"\1.mlp.0.\2"),
    (r"(time_in|guidance_in|txt_in\.t_embedder)\.out_layer\.(\w+)", r"\1.mlp.2.\2"),
    (r"txt_in\.c_embedder\.in_layer\.(\w+)", r"txt_in.c_embedder.linear_1.\1"),
    (r"txt_in\.c_embedder\.out_layer\.(\w+)", r"txt_in.c_embedder.linear_2.\1"),
    (r"(.+\.(?:img|txt|self)_attn)\.(qkv|proj)\.(\w+)", r"\1_\2.\3"),
    (r"(.+\.(?:img|txt)_attn)\.norm\.query_norm\.(?:scale|weight)", r"\1_q_norm.weight"),
    (r"(.+\.(?:img|txt)_attn)\.norm\.key_norm\.(?:scale|weight)", r"\1_k_norm.weight"),
    (r"(single_blocks\.\d+)\.norm\.query_norm\.(?:scale|weight)", r"\1.q_norm.weight"),
    (r"(single_blocks\.\d+)\.norm\.key_norm\.(?:scale|weight)", r"\1.k_norm.weight"),
    (r"(.+\.(?:img_|txt_|)mlp)\.0\.(\w+)", r"\1.fc1.\2"),
    (r"(.+\.(?:img_|txt_|)mlp)\.2\.(\w+)", r"\1.fc2.\2"),
    (r"(.+\.(?:img_mod|txt_mod|modulation))\.lin\.(\w+)", r"\1.linear.\2"),
)

HUNYUAN_VIDEO = FamilyNames(
    "hunyuan_video",
    "hunyuan-video",
    BLOCK_ALIASES,
    (*BLOCK_PARTS, *renamed_parts("", "", _DIFFUSERS_REST)),
    further=each("txt_in.individual_token_refiner.blocks.{n}.", "norm1 norm2"),
    converted_for="ComfyUI",
    sides=BLOCK_SIDES,
    released=((3072, BLOCK_DEPTHS),),
)

# whose own layout is that of diffusers
FRAMEPACK = FamilyNames(
    "framepack",
    "framepack",
    further=(
        *(part.theirs for part in HUNYUAN_VIDEO.parts),
        *each("clean_x_embedder.", "proj proj_2x proj_4x"),
        *each("image_projection.", "up down"),
    ),
    takes=("hunyuan_video",),
    # as diffusers' HunyuanVideoFramepackPipeline needs it; with another start it loads no layer
    start=layouts.IN_DIFFUSERS,
    converted_for="diffusers",
    is_as_in_diffusers=True,
    sides=(
        *layouts.IN_TWO_STREAMS,
        *((".norm1.linear", 6, 1), (".norm1_context.linear", 6, 1), (".norm.linear", 3, 1)),
        *((".proj_mlp", 4, 1), (".proj_out", 1, 5)),
    ),
    released=((3072, (("transformer_blocks", 20), ("single_transformer_blocks", 40))),),
)

# LTX-2, video and sound. Layers of blocks have the same names in diffusers, but for norms
_LTX_ATTENTIONS = (
    *("attn1", "attn2", "audio_attn1", "audio_attn2"),
    *("audio_to_video_attn", "video_to_audio_attn"),
)
_LTX_LAYERS = (
    *(
        (layer, layer)
        for name in _LTX_ATTENTIONS
        for layer in each(f"{name}.", "to_q to_k to_v to_out.0 to_gate_logits")
    ),
    *((f"{name}.norm_{x}", f"{name}.{x}_norm") for name in _LTX_ATTENTIONS for x in "qk"),
    *((f"{name}.net.{layer}",) * 2 for name in ("ff", "audio_ff") for layer in ("0.proj", "2")),
)
_LTX_TIMES = (
    *((f"{prefix}time_embed", f"{prefix}adaln_single") for prefix in ("", "audio_")),
    *((f"{prefix}prompt_adaln", f"{prefix}prompt_adaln_single") for prefix in ("", "audio_")),
    ("av_cross_attn_video_scale_shift", "av_ca_video_scale_shift_adaln_single"),
    ("av_cross_attn_audio_scale_shift", "av_ca_audio_scale_shift_adaln_single"),
    ("av_cross_attn_video_a2v_gate", "av_ca_a2v_gate_adaln_single"),
    ("av_cross_attn_audio_v2a_gate", "av_ca_v2a_gate_adaln_single"),
)
_LTX_TABLES = ("scale_shift_table", "prompt_scale_shift_table")
_LTX_STREAMS = ("video", "audio")
# between the text encoder and the transformer. diffusers has them in a part `connectors` of the pipeline,
# whose own file does without that word
_LTX_CONNECTORS = tuple(
    (start + theirs, ours)
    for start in ("connectors.", "")
    for theirs, ours in (
        *(
            (
                f"{stream}_connector.transformer_blocks.{{n}}.{one}",
                f"{stream}_embeddings_connector.transformer_1d_blocks.{{n}}.{two}",
            )
            for stream in _LTX_STREAMS
            for one, two in _LTX_LAYERS
            if one.startswith(("attn1.", "ff."))
        ),
        ("text_proj_in", "text_embedding_projection.aggregate_embed"),
        *(
            (f"{stream}_text_proj_in", f"text_embedding_projection.{stream}_aggregate_embed")
            for stream in _LTX_STREAMS
        ),
    )
)
_LTX_REGISTERS = tuple(
    (f"{start}{stream}_connector.learnable_registers", f"{stream}_embeddings_connector.learnable_registers")
    for start in ("connectors.", "")
    for stream in _LTX_STREAMS
)
# of sound, and between sound and picture
_LTX_SOUND = re.compile(r"audio|a2v|v2a|av_ca")

_LTX_ALIASES = (  # diffusers layout
    *((f"transformer_blocks.{{n}}.{one}", f"transformer_blocks.{{n}}.{two}") for one, two in _LTX_LAYERS),
    *(
        (f"{theirs}.{layer}", f"{ours}.{layer}")
        for theirs, ours in _LTX_TIMES
        for layer in each("", "linear emb.timestep_embedder.linear_1 emb.timestep_embedder.linear_2")
    ),
    *((f"{prefix}proj_in", f"{prefix}patchify_proj") for prefix in ("", "audio_")),
    *((f"{prefix}proj_out",) * 2 for prefix in ("", "audio_")),
    *((f"{prefix}caption_projection.linear_{n}",) * 2 for prefix in ("", "audio_") for n in (1, 2)),
    *_LTX_CONNECTORS,
)
_LTX_PARAMETERS = (
    *((f"transformer_blocks.{{n}}.{prefix}{one}",) * 2 for prefix in ("", "audio_") for one in _LTX_TABLES),
    *(
        (
            f"transformer_blocks.{{n}}.{one}_a2v_cross_attn_scale_shift_table",
            f"transformer_blocks.{{n}}.scale_shift_table_a2v_ca_{one}",
        )
        for one in _LTX_STREAMS
    ),
    *((f"{prefix}scale_shift_table",) * 2 for prefix in ("", "audio_")),
    *_LTX_REGISTERS,
)

LTX_2 = FamilyNames(
    "ltx_2",
    "ltx-2",
    _LTX_ALIASES,
    converted_for="diffusers, LTX-2's own pipelines and musubi-tuner's fork",
    versions=("ltx2", "ltx-2", "ltx_2"),
    optional=tuple(ours for _, ours in (*_LTX_ALIASES, *_LTX_PARAMETERS) if _LTX_SOUND.search(ours)),
    optional_words="sound (it was trained with --ltx2_mode av or audio), which this run is without",
    parameters=_LTX_PARAMETERS,
    text_side=(*(f"{stream}_embeddings_connector." for stream in _LTX_STREAMS), "text_embedding_projection."),
    text_side_words="the text connectors",
    unprefixed=("connectors.", "text_embedding_projection."),
)
