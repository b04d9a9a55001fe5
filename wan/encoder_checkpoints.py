"""Checkpoint files of Wan's umT5 and CLIP: recognise their dialects and read dimensions from tensors.

Our modules have the names of the official files, so these need no table. Each other dialect is a list of
(pattern, our name).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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
from modules.checkpoints.sources import TensorSource
from modules.errors import CheckpointError


@dataclass(frozen=True)
class T5Config:
    """Dimensions of an umT5 encoder."""

    vocabulary: int
    dim: int
    attention_dim: int  # all heads together
    ffn_dim: int
    num_heads: int
    num_layers: int
    num_buckets: int  # of relative positions


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

HF_T5: Names = (
    (r"shared\.weight", "token_embedding.weight"),
    (r"(?:encoder\.)?embed_tokens\.weight", "token_embedding.weight"),
    (r"(?:encoder\.)?final_layer_norm\.weight", "norm.weight"),
    (
        r"(?:encoder\.)?block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
        r"blocks.\1.pos_embedding.embedding.weight",
    ),
    (r"(?:encoder\.)?block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.weight", r"blocks.\1.attn.\2.weight"),
    (r"(?:encoder\.)?block\.(\d+)\.layer\.0\.layer_norm\.weight", r"blocks.\1.norm1.weight"),
    (r"(?:encoder\.)?block\.(\d+)\.layer\.1\.layer_norm\.weight", r"blocks.\1.norm2.weight"),
    (r"(?:encoder\.)?block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.weight", r"blocks.\1.ffn.gate.0.weight"),
    (r"(?:encoder\.)?block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.weight", r"blocks.\1.ffn.fc1.weight"),
    (r"(?:encoder\.)?block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.weight", r"blocks.\1.ffn.fc2.weight"),
)
SPIECE_MODEL = "spiece_model"  # the tokenizer's bytes in ComfyUI's files
_T5_PREFIXES = ("text_encoders.", "umt5xxl.", "text_encoder.", "transformer.")
_NOT_T5 = ("model.diffusion_model.", "vae.", "clip_vision.", SPIECE_MODEL, "logit_scale")
_T5_UNUSED = (SPIECE_MODEL, "decoder.*", "lm_head.weight", "logit_scale")


def read_t5(checkpoint: Checkpoint) -> LoadPlan[T5Config]:
    """Plan how to load an umT5 encoder, in 16 or 8 bits.

    Reads official names (also Kijai's) and Hugging Face's (ComfyUI, transformers).
    Raises CheckpointError for any other file.
    """
    checkpoint = checkpoint.without_prefix(*_T5_PREFIXES, others=_NOT_T5)
    # only with the official names: in Hugging Face's the same prefix is part of the name
    if "encoder.token_embedding.weight" in checkpoint.tensors:
        checkpoint = checkpoint.without_prefix("encoder.", others=_NOT_T5)
    # the same tensor, stored twice
    tied = "encoder.embed_tokens.weight" if "shared.weight" in checkpoint.tensors else ""
    sources = rename_sources(
        plain_sources(checkpoint), lambda name: name if name == tied else translate_name(name, HF_T5)
    )
    layers = count(sources, r"blocks\.\d+")
    if "token_embedding.weight" not in sources or "blocks.0.pos_embedding.embedding.weight" not in sources:
        raise other_kind(
            checkpoint, "an umT5 encoder", "--t5", "models_t5_umt5-xxl-enc-bf16.pth or umt5_xxl_*.safetensors"
        )
    if layers > 1 and "blocks.1.pos_embedding.embedding.weight" not in sources:
        raise CheckpointError(
            f"{checkpoint.path} is a T5 encoder, not an umT5: only its first block has a table of relative "
            "positions. "
            "Give models_t5_umt5-xxl-enc-bf16.pth or a file of the same model to --t5.",
            checkpoint.path,
        )
    shape = shapes_of(checkpoint, sources)
    vocabulary, dim = shape("token_embedding.weight")
    buckets, heads = shape("blocks.0.pos_embedding.embedding.weight")
    attention_dim, ffn_dim = shape("blocks.0.attn.q.weight")[0], shape("blocks.0.ffn.fc1.weight")[0]
    if attention_dim % heads:
        raise CheckpointError(
            f"{checkpoint.path}: {attention_dim} attention channels cannot be divided among {heads} heads.",
            checkpoint.path,
        )
    config = T5Config(vocabulary, dim, attention_dim, ffn_dim, heads, layers, buckets)
    return LoadPlan(config, checkpoint, sources, (*_T5_UNUSED, tied))


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
        sources["cls_embedding"] = sources["cls_embedding"].then(_with_two_axes)
        sources["pos_embedding"] = sources["pos_embedding"].then(_with_axis)
    last = count(sources, r"transformer\.\d+") - 1
    _join_qkv(sources, last)
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


def _join_qkv(sources: dict[str, TensorSource], blocks: int) -> None:
    """Replace separate q, k and v by one source of their joined rows."""
    for index in range(blocks):
        for leaf in ("weight", "bias"):
            names = [f"transformer.{index}.attn.{part}.{leaf}" for part in "qkv"]
            if all(name in sources for name in names):
                parts = [sources.pop(name) for name in names]
                sources[f"transformer.{index}.attn.to_qkv.{leaf}"] = TensorSource(
                    tuple(part.names[0] for part in parts), _rows
                )


def _rows(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _with_axis(tensor: Tensor) -> Tensor:
    return tensor[None]


def _with_two_axes(tensor: Tensor) -> Tensor:
    return tensor[None, None]
