"""Gemma 2 as a text encoder, up to the state before its last layer: what its tensors do not show.

Source: Gemma Team 2024, arXiv 2408.00118.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoders.language_models import (
    FEED_NORM,
    LanguageConfig,
    LanguageModel,
    load_language_model,
    read_language_model,
)
from encoders.language_states import language_states
from modules.checkpoints.dialects import LoadPlan
from modules.checkpoints.opening import Checkpoint
from modules.contract.loading import BlockPlace

OPTION = "--gemma2"
FILES = (
    "gemma_2_2b_fp16.safetensors, a folder of google/gemma-2-2b, or an all-in-one file of Lumina-Image-2.0"
)
STATES = (-2,)  # before the last layer; the model was trained with states without the final norm
SCALAR = "query_pre_attn_scalar"  # attention is scaled by its inverse square root


def read_settings(told: Mapping[str, Any], num_layers: int, head_width: int) -> dict[str, Any]:
    """Return settings of transformers' Gemma2Config: `LanguageModel.read_settings`.

    Raises ValueError or TypeError for a value that is no number.
    """
    return {SCALAR: int(told.get(SCALAR, head_width))}


GEMMA_2 = LanguageModel(
    what="a Gemma 2 language model",
    option=OPTION,
    files=FILES,
    classes="Gemma2",
    kind="gemma2",
    # those of transformers, which does not write them
    defaults={"head_dim": 256, SCALAR: 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    theta=10000.0,
    eps=1e-6,
    head_width=256,
    marks=(FEED_NORM,),
    # attention is spelled out, as soft-capping needs; every other layer looks back so many tokens
    settings={"attn_implementation": "eager", "attn_logit_softcapping": 50.0, "sliding_window": 4096},
    read_settings=read_settings,
)


def read_gemma(checkpoint: Checkpoint) -> LoadPlan[LanguageConfig]:
    """Plan how to load Gemma 2, under any prefix, fp8 too. Raises CheckpointError for any other file."""
    return read_language_model(checkpoint, GEMMA_2, STATES)


def load_gemma(
    path: Path, device: torch.device, dtype: torch.dtype, blocks: BlockPlace | None = None
) -> nn.Module:
    """Load Gemma 2 onto the device. fp8 weights are multiplied out.

    blocks: takes each layer. Raises CheckpointError if the file is damaged or holds another model.
    """
    return load_language_model(path, GEMMA_2, device, dtype, STATES, blocks=blocks)


def gemma_states(gemma: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the states before the last layer: B L C. ids, mask: B L, 1 for real tokens, which come first."""
    return language_states(gemma, gemma.get_submodule("embed_tokens")(ids), mask, STATES)
