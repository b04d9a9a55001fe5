"""The text encoders of a checkpoint: CLIP-L with Hugging Face's names, OpenCLIP's with its own.

Both become the same network, `ClipText`. OpenCLIP's files have queries, keys and values in one tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from checkpoints.dialects import LoadPlan
from checkpoints.opening import Checkpoint, list_tensor_sources
from encoders.clip_checkpoints import (
    ClipNaming,
    ClipTextConfig,
    clip_tokenizer_files,
    plan_clip_text,
    read_clip_text,
)
from modules.errors import CheckpointError
from networks.names.texts import open_clip_names
from protocols.loading import TensorSource
from stable_diffusion.contract import SD1, SD2, ModelKind
from stable_diffusion.files import EXPECTED_FILE

CLIP_L = "conditioner.embedders.0.transformer."
OPEN_CLIP = "conditioner.embedders.1.model."
SD1_TEXT = "cond_stage_model.transformer."
SD2_TEXT = "cond_stage_model.model."

# OpenCLIP's ViT-H has 24 layers, of which SD 2.x was trained with the first 23
SD2_LAYERS = 23

NAMING = ClipNaming(
    option="--ckpt",
    release=f"{EXPECTED_FILE}",
    description="CLIP",
    tokenizer=clip_tokenizer_files("--tokenizer_cache_dir", (".",)),
)

PROJECTION = "text_projection.weight"  # projection of the pooled state, in the network here
_UNUSED_OPEN_CLIP_TENSORS = ("text_projection*", "logit_scale", "attn_mask")


@dataclass(frozen=True)
class TextPlan:
    """How to load one text encoder from a checkpoint."""

    load_plan: LoadPlan[ClipTextConfig]
    is_open_clip: bool  # False: CLIP-L


def plan_text_encoders(checkpoint: Checkpoint, kind: ModelKind) -> tuple[TextPlan, ...]:
    """Plan how to load the text encoders of a single file.

    Raises:
        CheckpointError: If a text encoder is missing or its tensors are contradictory.
    """
    if kind is SD1:
        return (_read_clip_l(checkpoint, SD1_TEXT),)
    if kind is SD2:
        plan = _read_open_clip(checkpoint, SD2_TEXT)
        return (TextPlan(_without_unused_layer(plan.load_plan), is_open_clip=True),)
    return _read_clip_l(checkpoint, CLIP_L), _read_open_clip(checkpoint, OPEN_CLIP, is_projected=True)


def read_folder_text(checkpoint: Checkpoint, is_open_clip: bool, is_projected: bool) -> TextPlan:
    """Plan how to load a text encoder from a diffusers folder, using the config.json next to the weights.

    SD 2.x ignores the last layer. Released folders lack it; folders converted from OpenCLIP files have it.
    """
    plan = read_clip_text(checkpoint, NAMING)
    if is_open_clip and not is_projected and plan.config.num_layers > SD2_LAYERS:
        plan = _without_unused_layer(plan)
    if is_projected:
        plan = _with_projection(plan, checkpoint)
    return TextPlan(plan, is_open_clip)


def _read_clip_l(checkpoint: Checkpoint, prefix: str) -> TextPlan:
    tower = _select_part(checkpoint, prefix, "CLIP-L")
    return TextPlan(read_clip_text(tower, NAMING, {"hidden_act": "quick_gelu"}), is_open_clip=False)


def _read_open_clip(checkpoint: Checkpoint, prefix: str, is_projected: bool = False) -> TextPlan:
    """Plan how to load an OpenCLIP text encoder; each fused qkv projection is split into three weights."""
    tower = _select_part(checkpoint, prefix, "OpenCLIP")
    sources: dict[str, TensorSource] = {}
    for name, source in list_tensor_sources(tower).items():
        for our_name, third in open_clip_names(name) or [(name, None)]:
            sources[our_name] = source if third is None else source.with_step(partial(_cut_third, third))
    plan = plan_clip_text(tower, sources, {"hidden_act": "gelu"}, NAMING)
    plan = replace(plan, ignore=(*plan.ignore, *_UNUSED_OPEN_CLIP_TENSORS))
    return TextPlan(_with_projection(plan, tower) if is_projected else plan, is_open_clip=True)


def _cut_third(third: int, rows: Tensor) -> Tensor:
    return rows.chunk(3)[third]


def join_released(name: str, weights: Sequence[Tensor]) -> Tensor:
    """Return a tensor of a released file, built from a network's weights (inverse of `plan_text_encoders`).

    Args:
        name: Name of the tensor in the file.
        weights: One weight, or the query, key and value weights, which OpenCLIP stores as one tensor.
    """
    joined = weights[0] if len(weights) == 1 else torch.cat([*weights])
    return joined.t() if name.endswith("text_projection") else joined


def _select_part(checkpoint: Checkpoint, prefix: str, what: str) -> Checkpoint:
    """Return only the tensors with a prefix, and remove it; raise an error if there are none."""
    if not any(name.startswith(prefix) for name in checkpoint.tensors):
        raise CheckpointError(
            f"--ckpt {checkpoint.path} is incomplete: its text encoder {what} ({prefix}...) is missing.\n"
            f"  Pass {EXPECTED_FILE}.",
            checkpoint.path,
        )
    return checkpoint.without_prefix(prefix, ignored_prefixes=("",))


def _without_unused_layer(plan: LoadPlan[ClipTextConfig]) -> LoadPlan[ClipTextConfig]:
    """Drop the last layer from the plan, which SD 2.x does not use, if the file contains it."""
    config = plan.config
    if config.num_layers == SD2_LAYERS:
        return plan
    last = config.num_layers - 1
    start = f"encoder.layers.{last}."
    sources = {name: source for name, source in plan.sources.items() if not name.startswith(start)}
    ignore = (*plan.ignore, f"transformer.resblocks.{last}.*", f"{start}*")
    return replace(plan, config=replace(config, num_layers=last), sources=sources, ignore=ignore)


def _with_projection(plan: LoadPlan[ClipTextConfig], checkpoint: Checkpoint) -> LoadPlan[ClipTextConfig]:
    """Add the projection of the pooled state to the plan; OpenCLIP stores it transposed."""
    config = plan.config
    for name, is_linear in (("text_projection", False), (PROJECTION, True)):
        if name not in checkpoint.tensors:
            continue
        shape = checkpoint.tensors[name].shape
        # OpenCLIP's parameter is C x P, the weight of Hugging Face's linear layer is P x C
        width_axis, projection_axis = (1, 0) if is_linear else (0, 1)
        if len(shape) != 2 or shape[width_axis] != config.dim:
            raise CheckpointError(
                f"--ckpt {checkpoint.path}: its {name} is {' x '.join(map(str, shape))}, but the text "
                f"encoder has width {config.dim}. Copy the file again.",
                checkpoint.path,
            )
        source = list_tensor_sources(checkpoint)[name]
        if not is_linear:
            source = source.with_step(Tensor.t)
        return replace(
            plan,
            checkpoint=plan.checkpoint.join(checkpoint.select_by_prefix(name)),  # not in `text_model.`
            config=replace(config, projection_dim=shape[projection_axis]),
            sources={**plan.sources, PROJECTION: source},
        )
    raise CheckpointError(
        f"--ckpt {checkpoint.path} is incomplete: text_projection of its second text encoder is missing.\n"
        f"  Pass {EXPECTED_FILE}.",
        checkpoint.path,
    )
