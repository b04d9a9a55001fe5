"""Checkpoint files of HunyuanVideo's language model: recognise them, read dimensions.

It is published under several prefixes, alone or beside an image tower. So the prefix is whatever precedes the
name of the token embeddings, and tensors of other networks are left out by name. Our modules have Hugging
Face's names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.checkpoints.dialects import LoadPlan, count, other_kind, shapes_of
from modules.checkpoints.encoders import head_width, network_in, told_beside
from modules.checkpoints.opening import Checkpoint, plain_sources
from modules.errors import CheckpointError

LLAMA_FILES = (
    "the folder text_encoder of HunyuanVideo, llava-llama-3-8b-v1_1-transformers or "
    "llava_llama3_fp16.safetensors"
)

# beginnings of the names of tensors beside the wanted network: other parts of the same model, other networks
# of all-in-one files
_BESIDE_LLAMA = (
    # tokenizer: its bytes in ComfyUI's files
    *("lm_head.", "vision_tower.", "multi_modal_projector.", "image_newline", "tokenizer"),
    *(
        "language_model.lm_head.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
        "model.image_newline",
    ),
)
# saved by old versions of transformers; computed here
_COMPUTED = ("rotary_emb.inv_freq", "layers.*.rotary_emb.inv_freq")


@dataclass(frozen=True)
class LlamaConfig:
    """Dimensions of a Llama model, and how much of it is run."""

    vocabulary: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    num_layers: int  # that are run; layers after the wanted hidden state are left out
    final_norm: bool
    theta: float = 500000.0  # base of the rotary frequencies: Llama 3
    eps: float = 1e-5
    has_bias: bool = False  # of queries, keys and values


@dataclass(frozen=True)
class LanguageModel:
    """Facts about a released language model that its tensors do not show."""

    what: str  # for messages: "a Llama language model"
    option: str  # that names its file
    files: str  # which files are one, for messages
    kind: str  # prefix of `model_type` in a config.json
    beside: tuple[str, ...]  # beginnings of the names of tensors beside it
    defaults: Mapping[str, float]  # values that its config.json leaves out
    theta: float  # base of the rotary frequencies, if there is no config.json
    eps: float  # likewise
    has_bias: bool = False
    head_width: int = 128  # likewise; cannot be read from the tensors
    # kinds of rotary frequencies that are plain ones for a text
    rope_types: tuple[str, ...] = ("default",)


LLAMA = LanguageModel(
    "a Llama language model",
    "--text_encoder1",
    LLAMA_FILES,
    "llama",
    _BESIDE_LLAMA,
    {"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    LlamaConfig.theta,
    LlamaConfig.eps,
)


def read_llama(
    checkpoint: Checkpoint, skip_layers: int = 0, final_norm: bool = True, model: LanguageModel = LLAMA
) -> LoadPlan[LlamaConfig]:
    """Plan how to load the language model up to a hidden state.

    Reads LlavaForConditionalGeneration, LlamaForCausalLM, the bare LlamaModel and ComfyUI's files, in 16 or 8
    bits. skip_layers: how many of the last layers are left out. model: which one it has to be.
    Raises CheckpointError for any other file, or if it has fewer layers.
    """
    own = network_in(checkpoint, "embed_tokens.weight", "layers.0.self_attn.q_proj.weight", model.beside)
    if own is None or ("layers.0.self_attn.q_proj.bias" in own.tensors) != model.has_bias:
        raise other_kind(checkpoint, model.what, model.option, model.files)
    sources = plain_sources(own)
    shape = shapes_of(own, sources)
    all_layers = count(sources, r"layers\.\d+")
    num_layers = all_layers - skip_layers
    if num_layers < 0:
        raise CheckpointError(
            f"--hidden_state_skip_layer {skip_layers}: {checkpoint.path} has only {all_layers} layers. "
            "Give a smaller number.",
            checkpoint.path,
        )
    vocabulary, dim = shape("embed_tokens.weight")
    rows, key_rows = (
        shape("layers.0.self_attn.q_proj.weight")[0],
        shape("layers.0.self_attn.k_proj.weight")[0],
    )
    told = told_beside(checkpoint.path, "text_config", model.kind, dim, model.defaults)
    width = head_width(checkpoint.path, rows, told, model.head_width)
    if key_rows % width or (rows // width) % max(1, key_rows // width):
        raise CheckpointError(
            f"{checkpoint.path}: {rows} rows of queries and {key_rows} of keys cannot be divided into heads "
            f"of {width} channels. "
            "Put the model's config.json beside it, or give another copy of the file.",
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
        theta=_theta(checkpoint.path, told, model),
        eps=float(told.get("rms_norm_eps", model.eps)),
        has_bias=model.has_bias,
    )
    skipped = tuple(f"layers.{index}.*" for index in range(num_layers, all_layers))
    unused = (
        *_COMPUTED,
        *(f"{start}*" for start in model.beside),
        *skipped,
        *(() if final_norm else ("norm.weight",)),
    )
    return LoadPlan(config, own, sources, unused)


def _theta(path: Path, told: Mapping[str, Any], model: LanguageModel) -> float:
    """Return the base of the rotary frequencies.

    Raises CheckpointError if they are stretched, as in Llama 3.1 and later.
    """
    rope = told.get("rope_parameters") or told.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in model.rope_types:
        raise CheckpointError(
            f"{path}: its config.json asks for rotary frequencies of type {kind}, which the model that "
            f"the transformer was trained with does not use. Give {model.files} to {model.option}.",
            path,
        )
    return float(rope.get("rope_theta", told.get("rope_theta", model.theta)))
