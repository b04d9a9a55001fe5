"""Checkpoint files of Wan's umT5 and CLIP: recognise their dialects and read dimensions from tensors.

Our modules have the names of the official files, so these need no table. Each other dialect is a list of
(pattern, our name).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from encoders.t5_network import T5Config, T5Kind
from encoders.t5_network import read_t5 as read_any_t5
from modules.checkpoints.dialects import (
    LoadPlan,
    Names,
    count,
    other_kind,
    rename_sources,
    shapes_of,
    translate_name,
)
from modules.checkpoints.opening import Checkpoint, plain_sources
from modules.contract.loading import TensorSource
from modules.errors import CheckpointError


@dataclass(frozen=True)
class ClipConfig:
    """Dimensions of a CLIP image tower without its last block, whose output is never used."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    image_size: int
    patch_size: int


# umT5

UMT5 = T5Kind(
    name="umT5",
    what="an umT5 encoder",
    option="--t5",
    release="models_t5_umt5-xxl-enc-bf16.pth or umt5_xxl_*.safetensors",
    has_own_tables=True,
)


def read_t5(checkpoint: Checkpoint) -> LoadPlan[T5Config]:
    return read_any_t5(checkpoint, UMT5)


# CLIP ViT-H

CLIP_HEAD_WIDTH = 80  # cannot be read from the tensors of a ViT-H file

HF_CLIP: Names = (
    (r"embeddings\.class_embedding", "cls_embedding"),
    (r"embeddings\.position_embedding\.weight", "pos_embedding"),
    (r"embeddings\.patch_embedding\.weight", "patch_embedding.weight"),
    (r"pre_layrnorm\.(weight|bias)", r"pre_norm.\1"),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.(weight|bias)", r"transformer.\1.norm\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", r"transformer.\1.attn.\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)", r"transformer.\1.attn.proj.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.(weight|bias)", r"transformer.\1.mlp.0.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.(weight|bias)", r"transformer.\1.mlp.2.\2"),
)
_OTHER_TOWERS = (
    "textual.",
    "log_scale",
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
)


def read_clip(checkpoint: Checkpoint) -> LoadPlan[ClipConfig]:
    """Plan how to load the CLIP image tower: the official file, its visual half, or Hugging Face's names.

    Raises CheckpointError for any other file.
    """
    checkpoint = checkpoint.without_prefix("model.", "visual.", "vision_model.", others=_OTHER_TOWERS)
    sources = rename_sources(plain_sources(checkpoint), lambda name: translate_name(name, HF_CLIP))
    if (
        "cls_embedding" not in sources
        or "pos_embedding" not in sources
        or count(sources, r"transformer\.\d+") < 2
    ):
        raise other_kind(
            checkpoint,
            "a CLIP image encoder",
            "--clip",
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth or clip_vision_h.safetensors",
        )
    if "embeddings.class_embedding" in checkpoint.tensors:
        sources["cls_embedding"] = sources["cls_embedding"].then(lambda tensor: tensor[None, None])
        sources["pos_embedding"] = sources["pos_embedding"].then(lambda tensor: tensor[None])
    last = count(sources, r"transformer\.\d+") - 1
    for start in (f"transformer.{index}.attn" for index in range(last)):  # one matrix of q, k and v
        for leaf in ("weight", "bias"):
            names = [f"{start}.{part}.{leaf}" for part in "qkv"]
            if all(name in sources for name in names):
                joined = tuple(sources.pop(name).names[0] for name in names)
                sources[f"{start}.to_qkv.{leaf}"] = TensorSource(joined, _rows)
    shape = shapes_of(checkpoint, sources)
    dim, _, patch, _ = shape("patch_embedding.weight")
    if dim % CLIP_HEAD_WIDTH:
        raise CheckpointError(
            f"{checkpoint.path}: width {dim} is no multiple of {CLIP_HEAD_WIDTH}, the head width of ViT-H.",
            checkpoint.path,
        )
    side = math.isqrt(shape("pos_embedding")[-2] - 1)
    config = ClipConfig(
        dim, shape("transformer.0.mlp.0.weight")[0], dim // CLIP_HEAD_WIDTH, last, side * patch, patch
    )
    unused = (
        "head",
        "post_norm.*",
        "post_layernorm.*",
        "*.position_ids",
        f"transformer.{last}.*",
        f"encoder.layers.{last}.*",
    )
    return LoadPlan(config, checkpoint, sources, unused)


def _rows(*parts: Tensor) -> Tensor:
    return torch.cat(parts)
