"""LoRAs of a model for its deeper variants, in which copies of some blocks stand behind the originals.

`FamilyNames.grown` describes for a family which blocks were copied. The change of a block is put on the block
and its copies, unscaled. A LoRA is refused if it is for more blocks than the model has, or if the number of
its blocks is unknown.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from networks.key_formats import module_of_tensor
from networks.loading import LoraFile, LoraUse
from networks.module_names import select_family
from networks.names.layouts import OURS, GrownBlocks

logger = logging.getLogger(__name__)


def fit_depths(
    uses: Sequence[LoraUse], names: Iterable[str], model: Path | str = "the model"
) -> list[LoraUse]:
    """Map the blocks of LoRAs to those of a deeper or shallower model; LoRAs of the same depth are unchanged.

    Args:
        uses: LoRA files with their strengths.
        names: Names of the model's tensors or modules.
        model: File of the model, for messages.

    Raises:
        CheckpointError: For a LoRA whose blocks cannot be mapped to those of the model.
    """
    # how deeper variants of each LoRA's model repeat blocks; None: there are no such variants
    grown_of_uses = [use.lora.grown for use in uses]
    if not any(grown_of_uses):
        return [*uses]
    depths: dict[str, int] = {}  # name of a block list -> number of blocks in the model
    names = [*names]
    fitted = []
    for use, grown in zip(uses, grown_of_uses, strict=True):
        if grown is not None:
            if grown.blocks not in depths:
                depths[grown.blocks] = _count_blocks(names, grown)
            use = replace(use, lora=_fit(use.lora, grown, depths[grown.blocks], model))
        fitted.append(use)
    return fitted


def fit_to_file(uses: Sequence[LoraUse], model: Path) -> list[LoraUse]:
    """Map the blocks of LoRAs to those of a deeper or shallower transformer, whose header shows its depth."""
    if not any(use.lora.grown for use in uses):
        return [*uses]
    with open_checkpoint(model) as checkpoint:
        return fit_depths(uses, checkpoint.tensors, model)


def _count_blocks(names: Iterable[str], grown: GrownBlocks) -> int:
    """Return the number of blocks of a model.

    Args:
        names: Names of the model's tensors, in any layout.
        grown: How the family's deeper variants repeat blocks.
    """
    modules = dict.fromkeys(module_of_tensor(name)[0] for name in names)
    family = select_family(modules)
    list_names = [grown.blocks]
    if family is None or family.grown is not None:  # else the other names are those of another family's list
        list_names += grown.also_called
    return max(_find_indices(modules, list_names), default=-1) + 1


def _find_indices(modules: Iterable[str], list_names: Iterable[str]) -> set[int]:
    """Return the block indices in underscored module names, with or without our prefix.

    Args:
        modules: Names of the modules.
        list_names: Underscored names of the lists of blocks.
    """
    pattern = re.compile(rf"(?:{OURS})?(?:{'|'.join(map(re.escape, list_names))})_(\d+)_")
    return {int(match[1]) for match in map(pattern.match, modules) if match}


def read_depth(lora: LoraFile, grown: GrownBlocks) -> int | None:
    """Return the number of blocks of a LoRA, from metadata or its highest block index; None if unknown."""
    last_index = max(_find_indices(lora.modules(), [grown.blocks]), default=-1)
    for key in grown.keys:
        text = lora.metadata.get(key, "")
        if text.isdecimal() and last_index < int(text) <= grown.maximum:
            return int(text)
    return last_index + 1 if last_index + 1 in grown.depths else None


def _fit(lora: LoraFile, grown: GrownBlocks, depth: int, model: Path | str) -> LoraFile:
    """Map a LoRA's blocks to those of a model with `depth` blocks; raise CheckpointError if impossible.

    Args:
        lora: The LoRA file.
        grown: How the family's deeper variants repeat blocks.
        depth: Number of blocks of the model; 0 if its names show none.
        model: File of the model, for messages.
    """
    indices = _find_indices(lora.modules(), [grown.blocks])
    lora_depth = read_depth(lora, grown)
    # no block is changed, the model's depth is unknown, or both are equal
    if not indices or depth == 0 or lora_depth == depth:
        return lora
    if lora_depth is None:
        # a LoRA of unknown depth is taken to be for the first variant, and fits models of no known variant
        if depth not in grown.depths[1:]:
            return lora
        raise CheckpointError(
            f"{lora.path} changes blocks {min(indices)} to {max(indices)} and does not say for how many "
            f"blocks it is, {model} has {depth}. Give a LoRA with {grown.keys[0]} in its metadata, or one of "
            "all blocks.",
            lora.path,
        )
    if lora_depth > depth or lora_depth not in grown.depths or depth not in grown.depths:
        raise CheckpointError(
            f"{lora.path} is for {lora_depth} blocks, {model} has {depth}: blocks of the same number are not "
            f"the same there. Use the model with {lora_depth} blocks.",
            lora.path,
        )
    blocks = grown.map_blocks(lora_depth, depth)  # block of the LoRA -> the block and its copies
    # each tensor of a block is used in all copies of the block; other tensors are unchanged
    tensors = {}
    for name, tensor in lora.tensors.items():
        match = re.match(rf"({OURS}{re.escape(grown.blocks)}_)(\d+)(_.*)", name)
        if match is None:
            tensors[name] = tensor
            continue
        prefix, index, suffix = match.groups()
        for new_index in blocks[int(index)]:
            tensors[f"{prefix}{new_index}{suffix}"] = tensor
    logger.info(
        "%s is for %d blocks, the model has %d: what a block has learned is used in its copies too",
        lora.path,
        lora_depth,
        depth,
    )
    return replace(lora, tensors=tensors, metadata={**lora.metadata, grown.keys[0]: str(depth)})
