"""Gemma 2 as a text encoder: checkpoint files, and the network, whose classes are those of transformers.

Only the layers before the wanted state are built and loaded. Source: Gemma Team 2024, arXiv 2408.00118.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lumina.configs import GemmaConfig
from modules.checkpoints.dialects import LoadPlan, count, load_planned, other_kind, shapes_of
from modules.checkpoints.encoders import SPIECE_MODEL, network_in, told_beside
from modules.checkpoints.opening import Checkpoint, open_checkpoint, plain_sources
from modules.contract.family import DitSpec
from modules.contract.loading import BlockPlace
from modules.errors import CheckpointError

logger = logging.getLogger(__name__)

OPTION = "--gemma2"
FILES = (
    "gemma_2_2b_fp16.safetensors, a folder of google/gemma-2-2b, or an all-in-one file of Lumina-Image-2.0"
)
HEAD_WIDTH = 256  # of Gemma 2; cannot be read from the tensors
# values that a config.json leaves out: transformers do not write what equals their default
DEFAULTS = {"head_dim": 256, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
SPEC = DitSpec(block_lists=("layers",))  # where a LoRA goes
# beginnings of the names of tensors beside the wanted network
_BESIDE = ("lm_head.", SPIECE_MODEL, "logit_scale", "tokenizer")
_COMPUTED = ("rotary_emb.*", "layers.*.rotary_emb.inv_freq")


def read_gemma(checkpoint: Checkpoint) -> LoadPlan[GemmaConfig]:
    """Plan how to load Gemma 2 up to the state before its last layer, under any prefix, fp8 too.

    Raises CheckpointError for any other file.
    """
    own = network_in(checkpoint, "embed_tokens.weight", "layers.0.pre_feedforward_layernorm.weight", _BESIDE)
    if own is None or "layers.0.self_attn.q_norm.weight" in own.tensors:  # Gemma 3 has norms of queries
        raise other_kind(checkpoint, "a Gemma 2 language model", OPTION, FILES)
    sources = plain_sources(own)
    shape = shapes_of(own, sources)
    vocabulary, dim = shape("embed_tokens.weight")
    rows = shape("layers.0.self_attn.q_proj.weight")[0]
    key_rows = shape("layers.0.self_attn.k_proj.weight")[0]
    all_layers = count(sources, r"layers\.\d+")
    told = told_beside(checkpoint.path, "text_config", "gemma2", dim, DEFAULTS)
    config = _config(checkpoint.path, told, dim, rows, key_rows)
    plan = GemmaConfig(
        vocabulary=vocabulary,
        ffn_dim=shape("layers.0.mlp.gate_proj.weight")[0],
        num_layers=all_layers - 1,
        **config,
    )
    unused = (*_COMPUTED, *(f"{start}*" for start in _BESIDE), f"layers.{all_layers - 1}.*", "norm.weight")
    return LoadPlan(plan, own, sources, unused)


def load_gemma(
    path: Path, device: torch.device, dtype: torch.dtype, blocks: BlockPlace | None = None
) -> nn.Module:
    """Load Gemma 2 up to the state before its last layer, on the device. fp8 weights are multiplied out.

    blocks: takes each layer. Raises CheckpointError if the file is damaged or holds another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan, what = read_gemma(checkpoint), f"Gemma 2 ({OPTION})"
        gemma = load_planned(plan, build_gemma, device, dtype, what, blocks=blocks)
    _fill_computed(gemma, device)
    return gemma


def build_gemma(config: GemmaConfig) -> nn.Module:
    """Build the network with transformers' classes; its attention is spelled out, as soft-capping needs."""
    from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Model

    settings: dict[str, Any] = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.eps,
        "rope_theta": config.theta,
        "query_pre_attn_scalar": config.scalar,
        "attn_logit_softcapping": config.softcap,
        "sliding_window": config.window,
        "use_cache": False,
        "attn_implementation": "eager",
    }
    gemma: nn.Module = Gemma2Model(Gemma2Config(**settings))
    gemma.norm = nn.Identity()  # the model was trained with states before the final norm
    gemma.spec = SPEC  # type: ignore[assignment]
    return gemma


def gemma_states(gemma: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the states before the last layer: B L C. ids, mask: B L, 1 for real tokens, which come first."""
    tokens = gemma.embed_tokens(ids)  # type: ignore[operator]
    if ids.shape[1] <= gemma.config.sliding_window:  # type: ignore[union-attr,operator]
        mask = _causal(mask, tokens)
    states: Tensor = gemma(inputs_embeds=tokens, attention_mask=mask).last_hidden_state
    return states


def _causal(mask: Tensor, tokens: Tensor) -> Tensor:
    """Return the addend to the scores of all layers: B 1 L L, like `tokens`, B L C.

    transformers would make it from numbers without a network's tensor, which a memory plan cannot place.
    """
    length = tokens.shape[1]
    seen = (
        mask.bool()[:, None, None] & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    )
    added = tokens.new_zeros(len(tokens), 1, length, length)
    return added.masked_fill(~seen, torch.finfo(tokens.dtype).min)


def _config(path: Path, told: Mapping[str, Any], dim: int, rows: int, key_rows: int) -> dict[str, Any]:
    """Return the settings for the width of heads, from config.json if there is one."""
    width = int(told.get("head_dim", HEAD_WIDTH))
    if rows % width or key_rows % width or (rows // width) % max(1, key_rows // width):
        raise CheckpointError(
            f"{path}: {rows} rows of queries and {key_rows} of keys cannot be divided into heads of {width} "
            "channels. Put the model's config.json beside it, or give another copy of the file.",
            path,
        )
    heads = rows // width
    if dim % heads:
        raise CheckpointError(f"{path}: {heads} heads do not divide the width {dim}. Give {FILES}.", path)
    rope = told.get("rope_parameters") or {}
    return {
        "dim": dim,
        "num_heads": heads,
        "num_kv_heads": key_rows // width,
        "head_width": width,
        "scalar": int(told.get("query_pre_attn_scalar", width)),
        "theta": float(rope.get("rope_theta", told.get("rope_theta", GemmaConfig.theta))),
        "eps": float(told.get("rms_norm_eps", GemmaConfig.eps)),
    }


def _fill_computed(gemma: Any, device: torch.device) -> None:
    """Make tensors that files do not hold and networks on the meta device lack: angles and a factor."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding

    gemma.rotary_emb = Gemma2RotaryEmbedding(gemma.config).to(device)
    embeddings = gemma.embed_tokens
    if hasattr(embeddings, "embed_scale"):  # older versions compute it when it is needed
        embeddings.embed_scale = torch.tensor(embeddings.embedding_dim**0.5, device=device)
