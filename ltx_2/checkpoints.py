"""Checkpoints of the LTX-2 transformers: in the official file of all parts, and as diffusers writes them."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ltx_2.configs import LATENT, OF_SOUND, OF_VIDEO, SOUND, VIDEO, LtxConfig, StreamConfig, StreamNames
from ltx_2.model import LtxModel
from ltx_2.names import LTX_2
from ltx_2.options import NAME
from ltx_2.released import CONFIG, read_settings
from modules.checkpoints.dialects import DitShapes, Names, join_parts, joined_shapes, other_kind
from modules.checkpoints.dits import DitFormat, DitHeader
from modules.checkpoints.opening import Checkpoint, plain_sources
from modules.errors import CheckpointError
from networks.names.layouts import tensor_patterns

FILES = (
    "ltx-2-19b-dev.safetensors, ltx-2.3-22b-dev.safetensors, ltx-2.5-22b-dev-transformer-bf16.safetensors, "
    "or the folder transformer of its release in diffusers layout"
)
OPTION = "--dit"
# dialect -> a tensor that only it has, its names
DIALECTS: dict[str, tuple[str, Names]] = {
    "official": ("av_ca_a2v_gate_adaln_single.linear.weight", ()),
    "diffusers": ("av_cross_attn_video_a2v_gate.linear.weight", tensor_patterns(LTX_2)),
}
# of the official file, beside the transformer's tensors: parts of the text encoder
CONNECTORS = ("video_embeddings_connector.*", "audio_embeddings_connector.*")
DIFFUSERS_CLASS = "LTX2VideoTransformer3DModel"
BLOCK = "transformer_blocks.0"
PROMPT_TIMES, MARKER = "prompt_adaln_single.linear.weight", "keyframes_abs_pos_embedding"
USUAL_HEADS = 32  # of all releases; without gates no tensor tells


def _header(checkpoint: Checkpoint) -> DitHeader[LtxConfig]:
    names = checkpoint.tensors
    dialect = next((name for name, (mark, _) in DIALECTS.items() if mark in names), None)
    if dialect is None:
        raise other_kind(checkpoint, f"an {NAME} transformer", OPTION, FILES)
    known = joined_shapes({name: info.shape for name, info in names.items()}, DIALECTS[dialect][1])
    shapes = DitShapes(checkpoint.path, known, NAME)
    gates = f"{BLOCK}.attn1.to_gate_logits.weight"
    is_gated = gates in known
    told = read_settings(checkpoint, "transformer", DIFFUSERS_CLASS)
    if CONFIG in checkpoint.metadata:  # what the released reader takes if a record does not say
        told = {"av_ca_timestep_scale_multiplier": 1.0, **told}
    projects = "caption_projection.linear_1.weight" in known
    try:
        heads = shapes.of(gates)[0] if is_gated else int(told.get("num_attention_heads", USUAL_HEADS))
        config = LtxConfig(
            video=_stream(shapes, VIDEO, projects, told),
            sound=_stream(shapes, SOUND, projects, told),
            num_heads=heads,
            num_layers=shapes.blocks("transformer_blocks"),
            cross_dim=shapes.of(f"{BLOCK}.{VIDEO.cross_attn}.to_q.weight")[0],
            projects_text=projects,
            is_gated=is_gated,
            modulates_text=f"{BLOCK}.prompt_scale_shift_table" in known,
            times_text=_switch(told, "use_prompt_adaln_single", PROMPT_TIMES in known or not is_gated),
            marks_first=_switch(told, "use_keyframes_abs_pos_embedding", MARKER in known),
            freq_dim=shapes.of("adaln_single.emb.timestep_embedder.linear_1.weight")[1],
            **_told_fields(told),
        )
        widths = (*(one.dim for one in config.streams.values()), config.cross_dim)
        fits = all(width % (2 * heads) == 0 for width in widths)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: its record of settings cannot be read ({error!r}). Copy the file, or the "
            "config.json beside it, again.",
            checkpoint.path,
        ) from None
    if not fits:
        raise CheckpointError(
            f"{checkpoint.path}: widths of {', '.join(map(str, widths))} and {heads} heads are not those of "
            f"an {NAME} transformer. Copy the file again.",
            checkpoint.path,
        )
    block = next(info for name, info in names.items() if name.endswith(f"{BLOCK}.ff.net.2.weight"))
    return DitHeader(config, dialect, block.dtype)


def _told_fields(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dimensions that no tensor shows, from a record of settings in either layout.

    Raises ValueError for impossible numbers, and Python's own errors for values of other types.
    """
    rows, columns = (told.get(key, 2048) for key in ("base_height", "base_width"))
    usual = (told.get("pos_embed_max_pos", 20), rows, columns)
    longest = tuple(map(float, told.get("positional_embedding_max_pos", usual)))
    stride = tuple(map(int, told.get("vae_scale_factors", LATENT.stride)))
    gates = told.get(
        "av_ca_timestep_scale_multiplier", told.get("cross_attn_timestep_scale_multiplier", 1000)
    )
    gate_time = float(gates) / float(told.get("timestep_scale_multiplier", 1000))
    theta = float(told.get("positional_embedding_theta", told.get("rope_theta", 10000)))
    numbers = (gate_time, theta, *longest, *stride)
    if not len(longest) == len(stride) == 3 or not all(0 < one < math.inf for one in numbers):
        raise ValueError(f"gates {gate_time}, theta {theta}, positions {longest}, strides {stride}")
    return {
        "splits_heads": {"split": True, "interleaved": False}[told.get("rope_type", "split")],
        "gate_time": gate_time,
        "rope_theta": theta,
        "longest": longest,
        "stride": stride,
    }


def _switch(told: Mapping[str, Any], key: str, found: bool) -> bool:
    """Return a switch of the record of settings, else what the tensors show (`found`).

    Raises ValueError if it is neither true nor false. If they differ, loading names the tensors.
    """
    value = told.get(key, found)
    if type(value) is not bool:
        raise ValueError(f"{key} {value!r}")
    return value


def _stream(shapes: DitShapes, names: StreamNames, projects: bool, told: Mapping[str, Any]) -> StreamConfig:
    block = f"{BLOCK}.{names.prefix}"
    text = f"{names.prefix}caption_projection.linear_1" if projects else f"{block}attn2.to_k"
    dim, channels = shapes.of(f"{names.prefix}patchify_proj.weight")
    return StreamConfig(
        dim,
        ffn_dim=shapes.of(f"{block}ff.net.2.weight")[1],
        channels=channels,
        text_dim=shapes.of(f"{text}.weight")[1],
        ff_bias=_switch(told, f"{names.prefix}ff_bias", f"{block}ff.net.2.bias" in shapes.shapes),
    )


FORMAT = DitFormat(
    _header,
    lambda header: f"an {NAME} transformer (version {header.config.kind})",
    LtxModel,
    lambda checkpoint, header: join_parts(plain_sources(checkpoint), DIALECTS[header.dialect][1]),
    OPTION,
    CONNECTORS,
)
# without the sound's stream: none of its weights is read
SILENT = replace(
    FORMAT,
    network=lambda config, attention: LtxModel(replace(config, sound=None), attention),
    ignore=(*CONNECTORS, *OF_SOUND),
)
# without the video's
SOUND_ALONE = replace(
    FORMAT,
    network=lambda config, attention: LtxModel(replace(config, shows=False), attention),
    ignore=(*CONNECTORS, *OF_VIDEO),
)
identify = FORMAT.identify
