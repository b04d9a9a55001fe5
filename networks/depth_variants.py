"""Fit LoRAs of a model to its deeper variants, in which copies of some blocks follow the originals.

`FamilyNames.depth_variants` says which blocks of a family's models were copied. The change of a block is
applied to the block and its copies, unscaled. A LoRA is rejected if it is for more blocks than the model has.
If its depth is unknown, it is rejected for deeper variants only.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from networks.key_formats import split_tensor_name
from networks.loading import LoraFile, WeightedLora
from networks.module_names import select_family
from networks.names.layouts import OURS, DepthVariants

logger = logging.getLogger(__name__)


def fit_depths(
    weighted_loras: Sequence[WeightedLora], names: Iterable[str], model: Path | str = "the model"
) -> list[WeightedLora]:
    """Map LoRA blocks to the blocks of a deeper or shallower model; LoRAs of the same depth are unchanged.

    Args:
        weighted_loras: LoRA files with their strengths.
        names: Names of the model's tensors or modules.
        model: File of the model, for messages.

    Raises:
        CheckpointError: For a LoRA whose blocks cannot be mapped to the model's blocks.
    """
    # None: the LoRA's model has no deeper variants
    variants_by_lora = [weighted_lora.lora.depth_variants for weighted_lora in weighted_loras]
    if not any(variants_by_lora):
        return [*weighted_loras]
    model_depths: dict[str, int] = {}  # name of a block list -> number of blocks in the model
    names = [*names]
    fitted: list[WeightedLora] = []
    for weighted_lora, variants in zip(weighted_loras, variants_by_lora, strict=True):
        if variants is None:
            fitted.append(weighted_lora)
            continue
        if variants.blocks not in model_depths:
            model_depths[variants.blocks] = _count_blocks(names, variants)
        lora = _fit_blocks(weighted_lora.lora, variants, model_depths[variants.blocks], model)
        fitted.append(replace(weighted_lora, lora=lora))
    return fitted


def fit_to_file(weighted_loras: Sequence[WeightedLora], model: Path) -> list[WeightedLora]:
    """Map LoRA blocks to the blocks of a deeper or shallower transformer, whose file shows its depth."""
    if not any(weighted_lora.lora.depth_variants for weighted_lora in weighted_loras):
        return [*weighted_loras]
    with open_checkpoint(model) as checkpoint:
        return fit_depths(weighted_loras, checkpoint.tensors, model)


def _count_blocks(names: Iterable[str], depth_variants: DepthVariants) -> int:
    """Return the number of blocks of a model, judging by its tensor names."""
    modules = dict.fromkeys(split_tensor_name(name)[0] for name in names)
    family = select_family(modules)
    list_names = [depth_variants.blocks]
    # in a family without deeper variants, the other names mean different blocks
    if family is None or family.depth_variants is not None:
        list_names += depth_variants.other_list_names
    return max(_find_indices(modules, list_names), default=-1) + 1


def _find_indices(modules: Iterable[str], list_names: Iterable[str]) -> set[int]:
    """Return the block indices in underscored module names, with or without our prefix."""
    pattern = re.compile(rf"(?:{OURS})?(?:{'|'.join(map(re.escape, list_names))})_(\d+)_")
    return {int(match[1]) for match in map(pattern.match, modules) if match}


def read_depth(lora: LoraFile, depth_variants: DepthVariants) -> int | None:
    """Return the block count of a LoRA's model, from metadata or the highest block index; None if unknown."""
    last_index = max(_find_indices(lora.modules(), [depth_variants.blocks]), default=-1)
    for key in depth_variants.keys:
        text = lora.metadata.get(key, "")
        if text.isdecimal() and last_index < int(text) <= depth_variants.maximum:
            return int(text)
    return last_index + 1 if last_index + 1 in depth_variants.depths else None


def _fit_blocks(lora: LoraFile, variants: DepthVariants, model_depth: int, model: Path | str) -> LoraFile:
    """Map a LoRA's blocks to a model with a different depth; raise CheckpointError if that is impossible."""
    indices = _find_indices(lora.modules(), [variants.blocks])
    lora_depth = read_depth(lora, variants)
    changes_no_block = not indices
    if changes_no_block or model_depth == 0 or lora_depth == model_depth:
        return lora
    is_deeper_variant = model_depth in variants.depths[1:]
    if lora_depth is None and not is_deeper_variant:
        return lora  # assumed to be for a model of this depth
    if lora_depth is None:
        raise CheckpointError(
            f"{lora.path} changes blocks {min(indices)} to {max(indices)} without saying how many blocks its "
            f"model has; {model} has {model_depth}. Pass a LoRA with {variants.keys[0]} in its metadata, or "
            "one that changes all blocks.",
            lora.path,
        )
    are_variants = {lora_depth, model_depth} <= set(variants.depths)
    if lora_depth > model_depth or not are_variants:
        raise CheckpointError(
            f"{lora.path} is for {lora_depth} blocks, {model} has {model_depth}: equal block numbers mean "
            f"different blocks. Use the model with {lora_depth} blocks.",
            lora.path,
        )
    tensors = _copy_blocks(lora.tensors, variants.blocks, variants.map_to_deeper(lora_depth, model_depth))
    logger.info(
        "%s is for %d blocks, the model has %d: the changes of a block are applied to its copies too",
        lora.path,
        lora_depth,
        model_depth,
    )
    return replace(lora, tensors=tensors, metadata={**lora.metadata, variants.keys[0]: str(model_depth)})


def _copy_blocks(
    tensors: Mapping[str, Tensor], list_name: str, indices_in_model: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Return a LoRA's tensors, with each block's tensors repeated for its copies in a deeper model."""
    pattern = re.compile(rf"({OURS}{re.escape(list_name)}_)(\d+)(_.*)")
    copied: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = pattern.match(name)
        if match is None:  # not in a block
            copied[name] = tensor
            continue
        prefix, index, suffix = match.groups()
        for index_in_model in indices_in_model[int(index)]:
            copied[f"{prefix}{index_in_model}{suffix}"] = tensor
    return copied
