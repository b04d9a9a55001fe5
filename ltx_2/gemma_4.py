"""Gemma 4, the text model of LTX-2.5: its settings, and whether a file belongs to the release.

Source: transformers' Gemma4UnifiedTextConfig, and the released reader for the metadata of files.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints.encoders import read_config_json
from checkpoints.model_files import read_once
from checkpoints.opening import Checkpoint
from encoders.language_models import (
    FEED_NORM,
    FULL_ATTENTION,
    Q_NORM,
    SCALAR,
    SLIDING_ATTENTION,
    LanguageModel,
)
from ltx_2.model_options import GEMMA_4_KEY
from ltx_2.text_encoder import GEMMA_USE, NEAR_THETA, THETA, TOKENIZER_FILES, WINDOW
from modules.errors import CheckpointError
from modules.text_files import parse_json

OPTION = "--ltx2_text_encoder_checkpoint"
FILE = "gemma4-12b-with-proj-ltx-2.5-bf16.safetensors"
CONFIG = "gemma_config"  # metadata of its file


def read_settings(
    settings: Mapping[str, Any], num_layers: int, head_width: int, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Translate Gemma 4's settings to keyword arguments of transformers' Gemma4UnifiedTextConfig.

    Layers without a value projection attend to all tokens, have wider heads, and use their keys as values.
    The others attend to a window of tokens. Raises ValueError or TypeError for invalid values, and for
    another pattern of layers.
    """
    layers = _list_layer_types(num_layers, shapes)
    window = int(settings.get("sliding_window", WINDOW))
    rope = _read_rotary_settings(settings.get("rope_parameters") or {}, window)
    layer_types = settings.get("layer_types")
    partial_rotary_factor = rope[FULL_ATTENTION]["partial_rotary_factor"]
    if not 0 < partial_rotary_factor <= 1 or layers != list(layer_types or layers)[:num_layers]:
        raise ValueError(
            f"partial_rotary_factor {partial_rotary_factor}, layer_types {layer_types} for {layers}"
        )
    if layers[-1] != FULL_ATTENTION:
        raise ValueError(f"{num_layers} layers, of which the last one sees a window of tokens")
    # The head width and the number of key heads of layers that attend to all tokens
    full_layer = f"layers.{layers.index(FULL_ATTENTION)}.self_attn"
    (width,) = shapes.get(f"{full_layer}.q_norm.weight", (0,))
    rows = shapes.get(f"{full_layer}.k_proj.weight", (0,))[0]
    if width < 2 or rows < width or rows % width:
        raise ValueError(f"{rows} rows of keys for heads of {width} channels")
    return {
        "layer_types": layers,
        "global_head_dim": width,
        "num_global_key_value_heads": rows // width,
        "attention_k_eq_v": True,
        "sliding_window": window,
        "rope_parameters": rope,
    }


def _read_rotary_settings(rope: Mapping[str, Any], window: int) -> dict[str, dict[str, Any]]:
    """Return the rotary settings of both kinds of layers, with the released values for those left out."""
    sliding = {"rope_type": "default", "rope_theta": NEAR_THETA, **(rope.get(SLIDING_ATTENTION) or {})}
    full = {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": THETA,
        **(rope.get(FULL_ATTENTION) or {}),
    }
    theta = float(full["rope_theta"])
    sliding_theta = float(sliding["rope_theta"])
    partial_rotary_factor = float(full["partial_rotary_factor"])
    has_kinds = full["rope_type"] == "proportional" and sliding["rope_type"] == "default"
    are_positive = all(0 < number < math.inf for number in (theta, sliding_theta, window))
    if not has_kinds or not are_positive:
        raise ValueError(f"rotary frequencies {rope}, sliding_window {window}")
    return {
        SLIDING_ATTENTION: {"rope_type": "default", "rope_theta": sliding_theta},
        FULL_ATTENTION: {
            "rope_type": "proportional",
            "partial_rotary_factor": partial_rotary_factor,
            "rope_theta": theta,
        },
    }


def _list_layer_types(num_layers: int, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return each layer's attention kind: layers with a value projection are local, the others global."""
    layers = []
    for number in range(num_layers):
        has_values = f"layers.{number}.self_attn.v_proj.weight" in shapes
        layers.append(SLIDING_ATTENTION if has_values else FULL_ATTENTION)
    return layers


GEMMA_4 = LanguageModel(
    description="a Gemma 4 language model",
    option=OPTION,
    files=f"{FILE}, or the folder of a release in diffusers' layout to --gemma_root",
    class_prefix="Gemma4UnifiedText",
    kind="gemma4",
    word_key="gemma4",
    defaults={"hidden_size": 2304, "num_attention_heads": 8, "rms_norm_eps": 1e-6},
    theta=THETA,
    eps=1e-6,
    distinguishing_tensors=(Q_NORM, FEED_NORM, SCALAR),
    read_settings=read_settings,
    config_key=CONFIG,
    min_transformers="5.15",
)
# recorded under the same name as Gemma 3, so that a comparison notices texts of another release
GEMMA_4_USE = replace(
    GEMMA_USE,
    model=GEMMA_4,
    source=replace(
        GEMMA_USE.source,
        files=replace(
            TOKENIZER_FILES,
            option=OPTION,
            folder="",
            repository="google/gemma-4-12B-it",
            unique_token="<|turn>",
        ),
    ),
    record_prefix="gemma4",
)


def is_gemma_4(checkpoint: Checkpoint) -> bool:
    """Return whether a file is Gemma 4, whose layers each have a scalar weight."""
    return any(name.endswith(f"layers.0.{SCALAR}") for name in checkpoint.tensors)


def wanted_gemma(checkpoint: Checkpoint) -> str | None:
    """Return the Gemma version that a transformer was trained with; None if the file does not record it."""
    return _read_version(checkpoint, GEMMA_4_KEY)


def _read_own_version(checkpoint: Checkpoint) -> str | None:
    return _read_version(checkpoint, CONFIG)


def _read_version(checkpoint: Checkpoint, key: str) -> str | None:
    """Return the Gemma version in the metadata or else in config.json; None if neither names it."""
    try:
        settings = parse_json(checkpoint.metadata[key]) if key in checkpoint.metadata else {}
        if not settings and key == CONFIG:
            settings = read_config_json(checkpoint.path)[1] or {}
        version = settings.get("gemma_version")
        return None if version is None else str(version)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: {key} in its metadata cannot be read ({error}). Copy the file again.",
            checkpoint.path,
        ) from error


def check_version(transformer: Path, gemma: Path) -> None:
    """Raise CheckpointError if the transformer's metadata names another Gemma version."""
    trained_with = read_once(transformer, wanted_gemma)
    version = read_once(gemma, _read_own_version)
    if trained_with is not None and version != trained_with:
        raise CheckpointError(
            f"{gemma} is not the Gemma of LTX-2.5: {transformer} was trained with {trained_with}, this is "
            f"{version or 'one that does not say which it is'}. Pass {FILE} to {OPTION}.",
            gemma,
        )
