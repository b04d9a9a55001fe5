"""Checkpoints of the LTX-2 transformers: in the official file of all parts, and as diffusers writes them."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from checkpoints.dialects import DitShapes, Names, join_parts, joined_shapes, make_wrong_kind_error
from checkpoints.dits import DitFormat, DitHeader
from checkpoints.opening import Checkpoint, list_tensor_sources
from ltx_2.configs import (
    AUDIO,
    AUDIO_TENSOR_PATTERNS,
    LATENT,
    VIDEO,
    VIDEO_TENSOR_PATTERNS,
    LtxConfig,
    Modality,
    StreamConfig,
)
from ltx_2.model import LtxModel
from ltx_2.names import LTX_2
from ltx_2.options import NAME
from ltx_2.released import CONFIG, read_settings
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
# tensors of the text encoder that the official file contains next to the transformer
CONNECTORS = ("video_embeddings_connector.*", "audio_embeddings_connector.*")
DIFFUSERS_CLASS = "LTX2VideoTransformer3DModel"
BLOCK = "transformer_blocks.0"
TEXT_TIMESTEP_LAYER, SINGLE_FRAME_EMBEDDING = (
    "prompt_adaln_single.linear.weight",
    "keyframes_abs_pos_embedding",
)
DEFAULT_HEADS = 32  # number of heads in all releases, because without gates no tensor shows it


def _read_header(checkpoint: Checkpoint) -> DitHeader[LtxConfig]:
    names = checkpoint.tensors
    dialect = next((name for name, (tensor_name, _) in DIALECTS.items() if tensor_name in names), None)
    if dialect is None:
        raise make_wrong_kind_error(checkpoint, f"an {NAME} transformer", OPTION, FILES)
    file_shapes = {name: info.shape for name, info in names.items()}
    shapes = DitShapes(checkpoint.path, joined_shapes(file_shapes, DIALECTS[dialect][1]), NAME)
    settings = read_settings(checkpoint, "transformer", DIFFUSERS_CLASS)
    if CONFIG in checkpoint.metadata:  # defaults of the released reader for missing settings
        settings = {"av_ca_timestep_scale_multiplier": 1.0, **settings}
    config = _read_config(shapes, settings)
    layer = next(info for name, info in names.items() if name.endswith(f"{BLOCK}.ff.net.2.weight"))
    return DitHeader(config, dialect, layer.dtype)


def _read_config(shapes: DitShapes, settings: Mapping[str, Any]) -> LtxConfig:
    """Return a transformer's dimensions; raise CheckpointError if they are unreadable or do not match."""
    path = shapes.path
    try:
        config = _config(shapes, settings)
        widths = [*(stream.dim for stream in config.streams.values()), config.cross_dim]
        # rotary embedding rotates pairs of channels, so the width of a head must be even
        fits = all(width % (2 * config.num_heads) == 0 for width in widths)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path}: its stored settings cannot be read ({error!r}). Copy the file, or the "
            f"config.json next to it, again.",
            path,
        ) from None
    if not fits:
        raise CheckpointError(
            f"{path}: widths of {', '.join(map(str, widths))} and {config.num_heads} heads do not fit "
            f"an {NAME} transformer. Copy the file again.",
            path,
        )
    return config


def _config(shapes: DitShapes, settings: Mapping[str, Any]) -> LtxConfig:
    """Read a transformer's dimensions from its tensors and settings."""
    names = shapes.shapes
    gates = f"{BLOCK}.attn1.to_gate_logits.weight"
    has_head_gates = gates in names
    projects_text = "caption_projection.linear_1.weight" in names
    declared_heads = settings.get("num_attention_heads", DEFAULT_HEADS)
    # a gate per head shows the number of heads; other files declare it
    num_heads = shapes.get_shape(gates)[0] if has_head_gates else int(declared_heads)
    return LtxConfig(
        video=_read_stream(shapes, VIDEO, projects_text, settings),
        audio=_read_stream(shapes, AUDIO, projects_text, settings),
        num_heads=num_heads,
        num_layers=shapes.count_blocks("transformer_blocks"),
        cross_dim=shapes.get_shape(f"{BLOCK}.{VIDEO.cross_attn}.to_q.weight")[0],
        projects_text=projects_text,
        has_head_gates=has_head_gates,
        modulates_text=f"{BLOCK}.prompt_scale_shift_table" in names,
        modulates_text_by_timestep=_read_switch(
            settings, "use_prompt_adaln_single", TEXT_TIMESTEP_LAYER in names or not has_head_gates
        ),
        has_single_frame_embedding=_read_switch(
            settings, "use_keyframes_abs_pos_embedding", SINGLE_FRAME_EMBEDDING in names
        ),
        freq_dim=shapes.get_shape("adaln_single.emb.timestep_embedder.linear_1.weight")[1],
        **_read_fields(settings),
    )


def _read_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dimensions that no tensor shows, from settings in the official or diffusers' layout."""
    # of two names for a setting, the first is diffusers'; the release's one takes precedence
    frames = settings.get("pos_embed_max_pos", 20)
    rows = settings.get("base_height", 2048)
    columns = settings.get("base_width", 2048)
    max_positions = tuple(map(float, settings.get("positional_embedding_max_pos", (frames, rows, columns))))
    stride = tuple(map(int, settings.get("vae_scale_factors", LATENT.stride)))
    # The factor by which timesteps are multiplied for the gates between video and audio
    multiplier = settings.get("cross_attn_timestep_scale_multiplier", 1000)
    multiplier = settings.get("av_ca_timestep_scale_multiplier", multiplier)
    gate_timestep_scale = float(multiplier) / float(settings.get("timestep_scale_multiplier", 1000))
    theta = settings.get("rope_theta", 10000)
    theta = float(settings.get("positional_embedding_theta", theta))
    have_three_axes = len(max_positions) == len(stride) == 3  # frames, rows, columns
    values = (gate_timestep_scale, theta, *max_positions, *stride)
    are_positive = all(0 < value < math.inf for value in values)
    if not have_three_axes or not are_positive:
        raise ValueError(
            f"gates {gate_timestep_scale}, theta {theta}, positions {max_positions}, strides {stride}"
        )
    rope_type = settings.get("rope_type", "split")
    if rope_type not in ("split", "interleaved"):
        raise ValueError(f"rope_type {rope_type}")
    return {
        "rotates_halves": rope_type == "split",
        "gate_timestep_scale": gate_timestep_scale,
        "rope_theta": theta,
        "max_positions": max_positions,
        "stride": stride,
    }


def _read_switch(settings: Mapping[str, Any], key: str, default: bool) -> bool:
    """Return a boolean setting, or if it is missing `default`, which the tensors imply."""
    # A setting that contradicts the tensors fails later, when they are loaded.
    value = settings.get(key, default)
    if type(value) is not bool:
        raise ValueError(f"{key} {value!r}")
    return value


def _read_stream(
    shapes: DitShapes, names: Modality, projects: bool, settings: Mapping[str, Any]
) -> StreamConfig:
    """Read one stream's dimensions; without a projection, its text enters the blocks unchanged."""
    block = f"{BLOCK}.{names.prefix}"
    text = f"{names.prefix}caption_projection.linear_1" if projects else f"{block}attn2.to_k"
    dim, channels = shapes.get_shape(f"{names.prefix}patchify_proj.weight")
    return StreamConfig(
        dim,
        ffn_dim=shapes.get_shape(f"{block}ff.net.2.weight")[1],
        channels=channels,
        text_dim=shapes.get_shape(f"{text}.weight")[1],
        ff_bias=_read_switch(settings, f"{names.prefix}ff_bias", f"{block}ff.net.2.bias" in shapes.shapes),
    )


FORMAT = DitFormat(
    _read_header,
    lambda header: f"an {NAME} transformer (version {header.config.kind})",
    network=LtxModel,
    sources=lambda checkpoint, header: join_parts(
        list_tensor_sources(checkpoint), DIALECTS[header.dialect][1]
    ),
    option=OPTION,
    ignore=CONNECTORS,
)
# without the audio stream, none of its weights is read
SILENT = replace(
    FORMAT,
    network=lambda config, attention: LtxModel(replace(config, audio=None), attention),
    ignore=(*CONNECTORS, *AUDIO_TENSOR_PATTERNS),
)
# without the video's
AUDIO_ALONE = replace(
    FORMAT,
    network=lambda config, attention: LtxModel(replace(config, has_video=False), attention),
    ignore=(*CONNECTORS, *VIDEO_TENSOR_PATTERNS),
)
identify = FORMAT.identify
