"""Which files hold HunyuanVideo's language model and CLIP text tower, and their dimensions.

Both are published under several prefixes, alone or beside an image tower. So the prefix is whatever stands before the table of
token embeddings, and what belongs to other networks is left out by name. Our modules have Hugging Face's names.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.checkpoint import Checkpoint, plain_sources
from modules.dialects import LoadPlan, count, other_kind, shapes_of
from modules.errors import CheckpointError

logger = logging.getLogger(__name__)

LLAMA_HEAD_WIDTH = 128  # Llama 3; nothing in the tensors tells it
CLIP_HEAD_WIDTH = 64  # CLIP-L
CLIP_TOKENS = 77
# what a configuration means where it says nothing: transformers leave out what equals their default
LLAMA_DEFAULTS = {"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 10000.0, "rms_norm_eps": 1e-6}
CLIP_DEFAULTS = {"hidden_size": 512, "num_attention_heads": 8, "layer_norm_eps": 1e-5}

LLAMA_FILES = "the folder text_encoder of HunyuanVideo, llava-llama-3-8b-v1_1-transformers or llava_llama3_fp16.safetensors"
CLIP_FILES = "the folder text_encoder_2 of HunyuanVideo, clip-vit-large-patch14 or clip_l.safetensors"

# beginnings of names that stand beside the network wanted: other parts of the same model, other networks of all-in-one files
_BESIDE_LLAMA = (
    *("lm_head.", "vision_tower.", "multi_modal_projector.", "image_newline", "tokenizer"),  # tokenizer: bytes of ComfyUI's files
    *("language_model.lm_head.", "model.vision_tower.", "model.multi_modal_projector.", "model.image_newline"),
)
_BESIDE_CLIP = ("vision_model.", "visual_projection.", "text_projection", "logit_scale")
_BESIDE_ALL = ("model.diffusion_model.", "vae.", "first_stage_model.", "cond_stage_model.", "text_encoders.", "scaled_fp8")
_COMPUTED = ("rotary_emb.inv_freq", "layers.*.rotary_emb.inv_freq", "embeddings.position_ids")  # in files of old transformers


@dataclass(frozen=True)
class LlamaConfig:
    """Dimensions of a Llama model and how much of it is run."""

    vocabulary: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    num_layers: int  # that are run: those behind the hidden state wanted are left out
    final_norm: bool
    theta: float = 500000.0  # base of the rotary frequencies: Llama 3
    eps: float = 1e-5


@dataclass(frozen=True)
class ClipTextConfig:
    """Dimensions of a CLIP text tower."""

    vocabulary: int
    positions: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    activation: str = "quick_gelu"
    eps: float = 1e-5


def read_llama(checkpoint: Checkpoint, skip_layers: int = 0, final_norm: bool = True) -> LoadPlan[LlamaConfig]:
    """How to load the language model up to a hidden state. skip_layers: how many of the last layers are left out.

    LlavaForConditionalGeneration, LlamaForCausalLM or the bare LlamaModel, ComfyUI's files, fp8 or not.
    Raises CheckpointError for any other file, or where it has fewer layers.
    """
    own = _part(checkpoint, "embed_tokens.weight", "layers.0.self_attn.q_proj.weight", _BESIDE_LLAMA)
    if own is None:
        raise other_kind(checkpoint, "a Llama language model", "--text_encoder1", LLAMA_FILES)
    sources = plain_sources(own)
    shape = shapes_of(own, sources)
    all_layers = count(sources, r"layers\.\d+")
    num_layers = all_layers - skip_layers
    if num_layers < 0:
        raise CheckpointError(
            f"{checkpoint.path} has {all_layers} layers, --hidden_state_skip_layer {skip_layers} would skip more. "
            "Give a smaller number.",
            checkpoint.path,
        )
    vocabulary, dim = shape("embed_tokens.weight")
    rows, key_rows = shape("layers.0.self_attn.q_proj.weight")[0], shape("layers.0.self_attn.k_proj.weight")[0]
    told = _told_beside(checkpoint.path, "llama", dim, LLAMA_DEFAULTS)
    width = _head_width(checkpoint.path, rows, told, LLAMA_HEAD_WIDTH)
    if key_rows % width or (rows // width) % max(1, key_rows // width):
        raise CheckpointError(
            f"{checkpoint.path}: {rows} rows of queries and {key_rows} of keys are not made of heads of {width} channels. "
            "Put the model's config.json beside it, or give the file of another copy.",
            checkpoint.path,
        )
    config = LlamaConfig(
        vocabulary=vocabulary,
        dim=dim,
        ffn_dim=shape("layers.0.mlp.gate_proj.weight")[0],
        num_heads=rows // width,
        num_kv_heads=key_rows // width,
        head_width=width,
        num_layers=num_layers,
        final_norm=final_norm,
        theta=_theta(checkpoint.path, told),
        eps=float(told.get("rms_norm_eps", LlamaConfig.eps)),
    )
    skipped = tuple(f"layers.{index}.*" for index in range(num_layers, all_layers))
    unused = (*_COMPUTED, *(f"{start}*" for start in _BESIDE_LLAMA), *skipped, *(() if final_norm else ("norm.weight",)))
    return LoadPlan(config, own, sources, unused)


def read_clip_text(checkpoint: Checkpoint) -> LoadPlan[ClipTextConfig]:
    """How to load the text tower of a CLIP-L: the tower alone or both towers, with any prefix, fp8 or not.

    Raises CheckpointError for any other file.
    """
    own = _part(checkpoint, "embeddings.token_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight", _BESIDE_CLIP)
    if own is None:
        raise other_kind(checkpoint, "a CLIP text encoder", "--text_encoder2", CLIP_FILES)
    sources = plain_sources(own)
    shape = shapes_of(own, sources)
    vocabulary, dim = shape("embeddings.token_embedding.weight")
    positions = shape("embeddings.position_embedding.weight")[0]
    if positions < CLIP_TOKENS:
        raise CheckpointError(
            f"{checkpoint.path} takes {positions} tokens, HunyuanVideo gives {CLIP_TOKENS}. Give {CLIP_FILES} to --text_encoder2.",
            checkpoint.path,
        )
    told = _told_beside(checkpoint.path, "clip", dim, CLIP_DEFAULTS)
    config = ClipTextConfig(
        vocabulary=vocabulary,
        positions=positions,
        dim=dim,
        ffn_dim=shape("encoder.layers.0.mlp.fc1.weight")[0],
        num_heads=dim // _head_width(checkpoint.path, dim, told, CLIP_HEAD_WIDTH),
        num_layers=count(sources, r"encoder\.layers\.\d+"),
        activation=str(told.get("hidden_act", ClipTextConfig.activation)),
        eps=float(told.get("layer_norm_eps", ClipTextConfig.eps)),
    )
    return LoadPlan(config, own, sources, (*_COMPUTED, *(f"{start}*" for start in _BESIDE_CLIP)))


def _part(checkpoint: Checkpoint, embeddings: str, layer: str, beside: tuple[str, ...]) -> Checkpoint | None:
    """The network that has both of these tensors, without what stands before its names and beside it; None where none has.

    beside: beginnings of the names of other networks. Raises CheckpointError where there is something else.
    """
    prefixes = [name.removesuffix(embeddings) for name in checkpoint.tensors if name.endswith(embeddings)]
    prefix = next((prefix for prefix in prefixes if prefix + layer in checkpoint.tensors), None)
    if prefix is None:
        return None
    known = (*beside, *_BESIDE_ALL)
    strange = [name for name in checkpoint.tensors if not name.startswith((prefix, *known))]
    if strange:
        raise CheckpointError(
            f"{checkpoint.path}: beside {prefix}{embeddings} and its like it holds {len(strange)} tensors of an unknown network, "
            f"such as {', '.join(strange[:3])}. Give the file of the text encoder alone.",
            checkpoint.path,
        )
    return checkpoint.without_prefix(prefix, others=known)


def _head_width(path: Path, rows: int, told: Mapping[str, Any], usual: int) -> int:
    """Channels of a head: by the number of heads in config.json, else the usual width. Raises CheckpointError."""
    heads = told.get("num_attention_heads")
    if heads is None and rows % usual == 0:
        return usual
    if heads is not None and heads > 0 and rows % heads == 0:
        return rows // int(heads)
    how = f"config.json beside it says {heads} heads" if heads is not None else f"heads have {usual} channels"
    raise CheckpointError(f"{path}: {rows} rows of queries, but {how}. Give the config.json that belongs to it.", path)


def _theta(path: Path, told: Mapping[str, Any]) -> float:
    """Base of the rotary frequencies. Raises CheckpointError where they are stretched, as from Llama 3.1 on."""
    rope = told.get("rope_parameters") or told.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(
            f"{path}: its config.json asks for rotary frequencies of type {kind}; the model HunyuanVideo was trained with has none "
            f"of that. Give {LLAMA_FILES} to --text_encoder1.",
            path,
        )
    return float(rope.get("rope_theta", told.get("rope_theta", LlamaConfig.theta)))


def _told_beside(path: Path, kind: str, dim: int, defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the network in the config.json of its folder; nothing where there is none or it is of another model.

    kind: what its model_type begins with. dim: the width by the tensors. defaults: what is meant where a key is missing.
    Raises CheckpointError where config.json cannot be read.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        config = whole.get("text_config", whole)
        named = config.get("model_type")
        settings: dict[str, Any] = {**(defaults if named is not None else {}), **config}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as the configuration of a model ({error}).", file) from error
    if (named is not None and not str(named).startswith(kind)) or settings.get("hidden_size", dim) != dim:
        logger.info("%s is not of %s and is not used", file, path.name)
        return {}
    return settings
