"""Vision towers of language models: their classes in transformers, and how settings are read from files.

Source: Bai et al. 2025, arXiv 2502.13923 (Qwen2.5-VL), the report of Qwen3-VL, and the released
configurations.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from checkpoints.dialects import count

PATCHES = "patch_embed.proj.weight"  # name of the patch embedding
POSITIONS = "pos_embed.weight"  # name of the position embeddings
MAX_SIZE = 1 << 16  # largest number of heads, windows or layers that is accepted from a config.json
# settings of the released models, which their tensors do not show. Qwen2.5-VL:
HEAD_WIDTH = 80
WINDOW = 112  # side of the windows of local attention, in pixels
FULL_EVERY = 8  # each eighth layer attends to the whole image
# Qwen3-VL:
HEADS = 16
# number of layers -> the layers whose features are added to the language model's first layers (DeepStack)
DEEP_LAYERS = {24: [5, 11, 17], 27: [8, 16, 24]}

Sizes = Mapping[str, int]  # settings that the tensors show, by name in the configuration of transformers
ConfigJson = Mapping[str, Any]  # values of config.json; {} if there is none
Shapes = Mapping[str, tuple[int, ...]]  # shapes of the tensors by name


@dataclass(frozen=True)
class VisionTower:
    """A network that turns images into tokens for a language model, and how to recognize its files."""

    name: str  # name of the full model, for messages
    kind: str  # prefix of `model_type` in a config.json
    module: str  # module of transformers
    classes: tuple[str, str]  # classes of the configuration and of the network in this module
    feed: str  # weight of the first feed-forward layer, whose rows are the intermediate size
    merger: tuple[str, str]  # weights of the two layers that merge patches into tokens
    # returns additional settings; None if the tensors or config.json belong to a different tower
    read: Callable[[Sizes, ConfigJson, Shapes], Mapping[str, Any] | None]
    # mean and standard deviation of the colors, by argument of transformers' image processor; {}: CLIP's
    colors: Mapping[str, Sequence[float]] = field(default_factory=dict)


def _are_sizes(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < MAX_SIZE for value in values)


def _divides_heads(dim: int, heads: int) -> bool:
    """Return whether `heads` divides the width into heads of 4n channels, as rotary embedding requires."""
    return heads >= 1 and dim % (4 * heads) == 0


def _read_windows(sizes: Sizes, config_json: ConfigJson, shapes: Shapes) -> Mapping[str, Any] | None:
    """Return the settings of Qwen2.5-VL's windowed attention; None if the tensors contradict them."""
    dim = sizes["hidden_size"]
    heads = config_json.get("num_heads", dim // HEAD_WIDTH or 1)
    window = config_json.get("window_size", WINDOW)
    default_full = list(range(FULL_EVERY - 1, sizes["depth"], FULL_EVERY))
    full = config_json.get("fullatt_block_indexes", default_full)
    if not isinstance(full, list) or not _are_sizes(heads, window, *full) or not _divides_heads(dim, heads):
        return None
    token_side = sizes["patch_size"] * sizes["spatial_merge_size"]  # in pixels
    if window < token_side:
        return None
    return {"num_heads": heads, "window_size": window, "fullatt_block_indexes": full}


def _read_deepstack(sizes: Sizes, config_json: ConfigJson, shapes: Shapes) -> Mapping[str, Any] | None:
    """Return Qwen3-VL's settings that tensors do not show; None if config.json contradicts the tensors."""
    # With DeepStack, features of some inner layers are merged, too, and added to language model layers.
    num_layers = sizes["depth"]
    num_positions = _count_positions(shapes)
    num_mergers = count(shapes, r"deepstack_merger_list\.\d+")
    heads = config_json.get("num_heads", HEADS)
    # indices of the inner layers whose features are used
    deep_layers = config_json.get("deepstack_visual_indexes", DEEP_LAYERS.get(num_layers))
    if not isinstance(deep_layers, list) or not _are_sizes(heads, *deep_layers):
        return None
    if not _divides_heads(sizes["hidden_size"], heads) or num_positions is None:
        return None
    existing_layers = {*deep_layers} & {*range(num_layers)}  # fewer if an index is repeated or too large
    if len(existing_layers) != len(deep_layers) or len(deep_layers) != num_mergers:
        return None
    return {
        "num_heads": heads,
        "deepstack_visual_indexes": deep_layers,
        "num_position_embeddings": num_positions,
    }


def _read_single_merger(sizes: Sizes, config_json: ConfigJson, shapes: Shapes) -> Mapping[str, Any] | None:
    """Return a vision tower's settings, without DeepStack; None if config.json contradicts the tensors."""
    num_positions = _count_positions(shapes)
    heads = config_json.get("num_heads", HEADS)
    if not _are_sizes(heads) or not _divides_heads(sizes["hidden_size"], heads):
        return None
    if count(shapes, r"deepstack_merger_list\.\d+") or num_positions is None:
        return None
    return {"num_heads": heads, "num_position_embeddings": num_positions}


def _count_positions(shapes: Shapes) -> int | None:
    """Return the number of position embeddings; None unless they form a square grid."""
    num_positions = shapes.get(POSITIONS, (0,))[0]
    is_square = num_positions > 0 and math.isqrt(num_positions) ** 2 == num_positions
    return num_positions if is_square else None


QWEN25_TOWER = VisionTower(
    name="Qwen2.5-VL",
    kind="qwen2_5_vl",
    module="qwen2_5_vl",
    classes=("Qwen2_5_VLVisionConfig", "Qwen2_5_VisionTransformerPretrainedModel"),
    feed="blocks.0.mlp.gate_proj.weight",
    merger=("merger.mlp.0.weight", "merger.mlp.2.weight"),
    read=_read_windows,
)
QWEN3_TOWER = VisionTower(
    name="Qwen3-VL",
    kind="qwen3_vl",
    module="qwen3_vl",
    classes=("Qwen3VLVisionConfig", "Qwen3VLVisionModel"),
    feed="blocks.0.mlp.linear_fc1.weight",
    merger=("merger.linear_fc1.weight", "merger.linear_fc2.weight"),
    read=_read_deepstack,
    colors={"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
)
QWEN35_TOWER = VisionTower(
    name="Qwen3.5",
    kind="qwen3_5",
    module="qwen3_5",
    classes=("Qwen3_5VisionConfig", "Qwen3_5VisionModel"),
    feed="blocks.0.mlp.linear_fc1.weight",
    merger=("merger.linear_fc1.weight", "merger.linear_fc2.weight"),
    read=_read_single_merger,
    colors=QWEN3_TOWER.colors,
)
