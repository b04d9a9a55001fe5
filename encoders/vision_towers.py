"""Vision towers of language models as values: their classes in transformers, and settings by their files.

Source: Bai et al. 2025, arXiv 2502.13923 (Qwen2.5-VL), the report of Qwen3-VL, and the released
configurations.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from checkpoints.dialects import count

PATCHES, PLACES = "patch_embed.proj.weight", "pos_embed.weight"
MAX_SIZE = 1 << 16  # of these in a config.json
# as released, not to be read from the tensors. Of Qwen2.5-VL:
HEAD_WIDTH = 80
WINDOW = 112  # pixels that layers attend within
FULL_EVERY = 8  # each eighth layer attends to the whole image
# of Qwen3-VL: heads, and by the number of layers those whose states reach the language model's first layers
HEADS = 16
DEEP_LAYERS = {24: [5, 11, 17], 27: [8, 16, 24]}

Sizes = Mapping[str, int]  # settings of transformers' configuration
ConfigJson = Mapping[str, Any]  # a config.json's values, {} if there is none
Shapes = Mapping[str, tuple[int, ...]]  # of its tensors


@dataclass(frozen=True)
class VisionTower:
    """A network that makes tokens for a language model from images, and how its files are recognized."""

    name: str  # of the whole model, for messages
    kind: str  # prefix of `model_type` in a config.json
    module: str  # of transformers
    classes: tuple[str, str]  # there: its configuration and its network
    feed: str  # tensor with a row for each number between the layers of a feed-forward
    merger: tuple[str, str]  # the two of the layers that make tokens of patches
    # further settings; None: the tensors or the config.json are those of another tower
    read: Callable[[Sizes, ConfigJson, Shapes], Mapping[str, Any] | None]
    # mean and deviation of the colors, as transformers' image processor calls them; {}: CLIP's
    colors: Mapping[str, Sequence[float]] = field(default_factory=dict)


def _are_sizes(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < MAX_SIZE for value in values)


def _read_windows(sizes: Sizes, config_json: ConfigJson, shapes: Shapes) -> Mapping[str, Any] | None:
    """Read the sizes of windowed attention (default: Qwen2.5-VL's); None if they do not fit."""
    dim = sizes["hidden_size"]
    patch = sizes["patch_size"]
    heads = config_json.get("num_heads", dim // HEAD_WIDTH or 1)
    window = config_json.get("window_size", WINDOW)
    default_full = list(range(FULL_EVERY - 1, sizes["depth"], FULL_EVERY))
    full = config_json.get("fullatt_block_indexes", default_full)
    if not isinstance(full, list) or not _are_sizes(heads, window, *full) or heads < 1 or dim % (4 * heads):
        return None
    if window < patch * sizes["spatial_merge_size"]:
        return None
    return {"num_heads": heads, "window_size": window, "fullatt_block_indexes": full}


def _read_deep(sizes: Sizes, config_json: ConfigJson, shapes: Shapes) -> Mapping[str, Any] | None:
    """Return Qwen3-VL's settings that tensors do not show; None if config.json contradicts the tensors.

    DeepStack: features of some inner layers are merged too, and added to layers of the language model.
    """
    dim = sizes["hidden_size"]
    layers = sizes["depth"]
    num_positions = shapes.get(PLACES, (0,))[0]
    mergers = count(shapes, r"deepstack_merger_list\.\d+")
    heads = config_json.get("num_heads", HEADS)
    deep_layers = config_json.get("deepstack_visual_indexes", DEEP_LAYERS.get(layers))
    if (
        not isinstance(deep_layers, list)
        or not _are_sizes(heads, *deep_layers)
        or heads < 1
        or dim % (4 * heads)
    ):
        return None
    are_layers = len({*deep_layers} & {*range(layers)}) == len(deep_layers)
    if not are_layers or len(deep_layers) != mergers:
        return None
    if num_positions < 1 or math.isqrt(num_positions) ** 2 != num_positions:
        return None
    return {
        "num_heads": heads,
        "deepstack_visual_indexes": deep_layers,
        "num_position_embeddings": num_positions,
    }


def _read_plain(sizes: Sizes, config_json: ConfigJson, shapes: Shapes) -> Mapping[str, Any] | None:
    """Return the settings of a tower with one merger, whose states reach no layer of the language model."""
    places = shapes.get(PLACES, (0,))[0]
    heads = config_json.get("num_heads", HEADS)
    if not _are_sizes(heads) or heads < 1 or sizes["hidden_size"] % (4 * heads):
        return None
    if count(shapes, r"deepstack_merger_list\.\d+") or places < 1 or math.isqrt(places) ** 2 != places:
        return None
    return {"num_heads": heads, "num_position_embeddings": places}


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
    read=_read_deep,
    colors={"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
)
QWEN35_TOWER = VisionTower(
    name="Qwen3.5",
    kind="qwen3_5",
    module="qwen3_5",
    classes=("Qwen3_5VisionConfig", "Qwen3_5VisionModel"),
    feed="blocks.0.mlp.linear_fc1.weight",
    merger=("merger.linear_fc1.weight", "merger.linear_fc2.weight"),
    read=_read_plain,
    colors=QWEN3_TOWER.colors,
)
