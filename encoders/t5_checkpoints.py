"""Checkpoint files of T5 v1.1, umT5 and ByT5 encoders: recognise their dialects, read their dimensions.

Our modules have the names of Wan's official umT5, so that file needs no table.
"""

from dataclasses import dataclass

from modules.checkpoints.dialects import (
    LoadPlan,
    Names,
    count,
    other_kind,
    rename_sources,
    shapes_of,
    translate_name,
)
from modules.checkpoints.encoders import SPIECE_MODEL
from modules.checkpoints.opening import Checkpoint, plain_sources
from modules.errors import CheckpointError


@dataclass(frozen=True)
class T5Config:
    """Dimensions of a T5 v1.1 or umT5 encoder."""

    vocabulary: int
    dim: int
    attention_dim: int  # all heads together
    ffn_dim: int
    num_heads: int
    num_layers: int
    num_buckets: int  # of relative positions
    shares_positions: bool = (
        False  # all blocks use the table of the first one: T5; else each has its own: umT5
    )


@dataclass(frozen=True)
class T5Kind:
    """The encoder that a family needs, and its name in messages."""

    name: str  # "umT5"
    what: str  # "an umT5 encoder"
    option: str  # "--t5"
    release: str  # files that are one
    has_own_tables: bool  # each block has its table of relative positions: umT5; else only the first: T5


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
_T5_PREFIXES = (
    *("module.text_tower.", "text_encoders.", "umt5xxl.", "t5xxl.", "byt5.", "text_encoder."),
    *("text_encoder_2.", "transformer."),
)
_NOT_T5 = (
    *("model.diffusion_model.", "vae.", "first_stage_model.", "clip_vision.", "clip_l.", "clip_g."),
    *(SPIECE_MODEL, "logit_scale", "module.", "scaled_fp8"),
)
_T5_UNUSED = (SPIECE_MODEL, "decoder.*", "lm_head.weight", "logit_scale")


def read_t5(checkpoint: Checkpoint, kind: T5Kind) -> LoadPlan[T5Config]:
    """Plan how to load an encoder of that kind, in 16 or 8 bits.

    Reads Wan's official names (also Kijai's) and Hugging Face's (ComfyUI, transformers), alone or in an
    all-in-one file.
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
        raise other_kind(checkpoint, kind.what, kind.option, kind.release)
    has_own_tables = "blocks.1.pos_embedding.embedding.weight" in sources
    if layers > 1 and has_own_tables != kind.has_own_tables:
        found = (
            "an umT5 encoder, not a T5: each of its blocks has"
            if has_own_tables
            else "a T5 encoder, not an umT5: only its first block has"
        )
        raise CheckpointError(
            f"{checkpoint.path} is {found} a table of relative positions. Give {kind.release} to "
            f"{kind.option}.",
            checkpoint.path,
        )
    if "blocks.0.ffn.gate.0.weight" not in sources:
        raise CheckpointError(
            f"{checkpoint.path} is a T5 of the first version, whose feed-forward layers have no gate. Give "
            f"{kind.release} to {kind.option}.",
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
    config = T5Config(
        vocabulary, dim, attention_dim, ffn_dim, heads, layers, buckets, not kind.has_own_tables
    )
    return LoadPlan(config, checkpoint, sources, (*_T5_UNUSED, tied))
