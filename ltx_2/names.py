"""LTX-2's names: scripts, modules in LoRA files, and tensors that identify its files."""

import re

from networks.names.layouts import COMFYUI, FamilyNames, with_endings
from protocols.families import CLIPS, FamilyEntry, Marks

ENTRY = FamilyEntry(
    "ltx_2",
    script="ltx2",
    cache="ltx2_cache",
    makes="video",
    record="Ltx2",
    encoders=(("ltx2_checkpoint", "--ltx2_checkpoint", CLIPS),),
    further_models=("ltx2_v1",),
)

# LTX-2, video and audio. Layers of blocks have the same names in diffusers, except norms
_LTX_ATTENTIONS = (
    "attn1",
    "attn2",
    "audio_attn1",
    "audio_attn2",
    "audio_to_video_attn",
    "video_to_audio_attn",
)
_LTX_LAYERS = (
    *(
        (layer, layer)
        for name in _LTX_ATTENTIONS
        for layer in with_endings(f"{name}.", "to_q to_k to_v to_out.0 to_gate_logits")
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
# layers between text encoder and transformer. In diffusers they are the pipeline's part `connectors`, whose
# own file omits that prefix
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
# layers of audio, layers between audio and image, and layers of images: a run with one stream omits some
_LTX_STREAM = re.compile(r"audio|a2v|v2a|av_ca|^transformer_blocks\.\{n\}\.(attn\d|ff)\.(?!to_gate)")

_LTX_ALIASES = (  # diffusers layout
    *((f"transformer_blocks.{{n}}.{one}", f"transformer_blocks.{{n}}.{two}") for one, two in _LTX_LAYERS),
    *(
        (f"{theirs}.{layer}", f"{ours}.{layer}")
        for theirs, ours in _LTX_TIMES
        for layer in with_endings("", "linear emb.timestep_embedder.linear_1 emb.timestep_embedder.linear_2")
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
    ("keyframes_abs_pos_embedding",) * 2,
    *_LTX_REGISTERS,
)
_LTX_NUMBERED = (
    "attn1",
    "attn2",
    "ff",
    "audio_attn1",
    "audio_attn2",
    "audio_ff",
    "audio_to_video_attn",
    "video_to_audio_attn",
)

LTX_2 = FamilyNames(
    "ltx_2",
    "ltx-2",
    _LTX_ALIASES,
    converted_for="diffusers, LTX-2's own pipelines and musubi-tuner's fork",
    # the names of its official code, which ComfyUI, diffusers and the fork of musubi-tuner read, too
    default_format=COMFYUI,
    not_in_diffusers=(("DoRA", "diffusers leaves the magnitudes of LTX-2's DoRAs out"),),
    version_prefixes=("ltx2", "ltx-2", "ltx_2"),
    release_pattern=r"(?:architecture=ltx-|model_version=)(\d\.\d)",
    newest_release=("2.5", "keyframes_abs_pos_embedding"),
    optional_paths=tuple(ours for _, ours in (*_LTX_ALIASES, *_LTX_PARAMETERS) if _LTX_STREAM.search(ours)),
    optional_description="a stream that this run is without (audio or images, --ltx2_mode)",
    parameters=_LTX_PARAMETERS,
    text_module_prefixes=(
        *(f"{stream}_embeddings_connector." for stream in _LTX_STREAMS),
        "text_embedding_projection.",
    ),
    text_module_description="the text connectors",
    unprefixed_paths=("connectors.", "text_embedding_projection."),
    optimizer_numbering=(
        *((f"{prefix}caption_projection.", "linear_1 linear_2") for prefix in ("", "audio_")),
        (
            "transformer_blocks.{n}.",
            " ".join(
                f"{part}.net.0.proj {part}.net.2"
                if part.endswith("ff")
                else "{x}.to_q {x}.to_k {x}.to_v {x}.to_gate_logits {x}.to_out.0".replace("{x}", part)
                for part in _LTX_NUMBERED
            ),
        ),
    ),
    network_module="networks.lora_ltx2",
)

LORA = (LTX_2,)
_LTX_09 = "the transformer of LTX-Video 0.9, a different network than LTX-2's, which is not supported yet"
_LTX_2_CONNECTORS = "the connectors of LTX-2, a part of its text encoder"
MARKS: Marks = (
    ("audio_patchify_proj.weight", "an LTX-2 transformer (--dit)"),
    ("audio_time_embed.linear.weight", "an LTX-2 transformer in diffusers layout (--dit)"),
    ("audio_embeddings_connector.learnable_registers", _LTX_2_CONNECTORS),
    ("audio_connector.learnable_registers", _LTX_2_CONNECTORS),
    ("patchify_proj.weight", _LTX_09),
    ("time_embed.linear.weight", f"{_LTX_09}, in diffusers layout"),
)
