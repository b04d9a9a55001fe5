"""Gemma 3 as a text encoder: what its tensors do not show.

Source: Gemma Team 2025, arXiv 2503.19786, and the config.json of google/gemma-3-12b-it.
"""

import math
from collections.abc import Mapping
from typing import Any

from encoders.language_models import FAR, FEED_NORM, NEAR, Q_NORM, LanguageModel

# of the 12B model, and so of its text half in a file without a config.json
STRETCH = 8.0  # positions of FAR layers are divided by it
WINDOW = 1024  # tokens that NEAR layers look back
PATTERN = 6  # every so manieth layer is FAR
THETA, NEAR_THETA = 1e6, 1e4  # bases of the rotary frequencies


def read_settings(told: Mapping[str, Any], num_layers: int, head_width: int) -> dict[str, Any]:
    """Return settings of transformers' Gemma3TextConfig: `LanguageModel.read_settings`.

    Reads the keys of transformers 4 and 5. Raises ValueError or TypeError for values that are none.
    """
    rope = told.get("rope_parameters") or {}
    far, near = rope.get(FAR) or {}, rope.get(NEAR) or {}
    scaling = far if rope else told.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    stretch = float(scaling.get("factor", 1.0)) if told else STRETCH
    theta = float(far.get("rope_theta", told.get("rope_theta", THETA)))
    near_theta = float(near.get("rope_theta", told.get("rope_local_base_freq", NEAR_THETA)))
    scalar, window = (
        int(told.get("query_pre_attn_scalar", head_width)),
        int(told.get("sliding_window", WINDOW)),
    )
    pattern = int(told.get("sliding_window_pattern", told.get("_sliding_window_pattern", PATTERN)))
    numbers = (stretch, theta, near_theta, scalar, window, pattern)
    if kind not in ("default", "linear") or not all(0 < one < math.inf for one in numbers):
        raise ValueError(f"rotary frequencies of type {kind}, numbers {', '.join(map(str, numbers))}")
    layers = told.get("layer_types") or [FAR if (n + 1) % pattern == 0 else NEAR for n in range(num_layers)]
    layers = list(map(str, layers))[:num_layers]
    if len(layers) < num_layers or not {FAR, NEAR} >= set(layers):
        raise ValueError(f"layer_types {layers} of {num_layers} layers")
    return {
        "rope_theta": theta,
        "rope_local_base_freq": near_theta,
        "rope_scaling": None if stretch == 1 else {"rope_type": "linear", "factor": stretch},
        "query_pre_attn_scalar": scalar,
        "sliding_window": window,
        "layer_types": layers,
    }


GEMMA_3 = LanguageModel(
    what="a Gemma 3 language model",
    option="--gemma_root",
    files=(
        "the folder of google/gemma-3-12b-it-qat-q4_0-unquantized, or one file of the model to "
        "--gemma_safetensors and its folder"
    ),
    classes="Gemma3Text",
    kind="gemma3",
    # those of transformers, which does not write them
    defaults={
        "hidden_size": 2304,
        "num_attention_heads": 8,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    theta=THETA,
    eps=1e-6,
    marks=(Q_NORM, FEED_NORM),
    rope_types=("default", "linear"),
    read_settings=read_settings,
)
