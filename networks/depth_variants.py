"""LoRAs of a model for its deeper variants, in which copies of some blocks stand behind the originals.

`FamilyNames.grown` says of a family which blocks were copied. The change of a block is put on the block and
its copies, unscaled. A LoRA for more blocks than the model has is refused, and one that does not tell for how
many it is.
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
    grown_of_uses = [use.lora.grown for use in uses]
    if not any(grown_of_uses):
        return [*uses]
    depths: dict[str, int] = {}
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
    """Map the blocks of LoRAs to those of a transformer's file, as `fit_depths` does for names."""
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
    starts = (
        [grown.blocks, *grown.also_called] if family is None or family.grown is not None else [grown.blocks]
    )
    numbers = _numbers_in(modules, starts)
    return max(numbers, default=-1) + 1


def _numbers_in(modules: Iterable[str], starts: Iterable[str]) -> set[int]:
    """Return the block indices in underscored names, with or without our prefix."""
    pattern = re.compile(rf"(?:{OURS})?(?:{'|'.join(map(re.escape, starts))})_(\d+)_")
    return {int(match[1]) for match in map(pattern.match, modules) if match}


def read_depth(lora: LoraFile, grown: GrownBlocks) -> int | None:
    """Return the number of blocks of a LoRA, from metadata or its highest block index; None if unknown."""
    highest = max(_numbers_in(lora.modules(), [grown.blocks]), default=-1)
    for key in grown.keys:
        text = lora.metadata.get(key, "")
        if text.isdecimal() and highest < int(text) <= grown.maximum:
            return int(text)
    return highest + 1 if highest + 1 in grown.depths else None


def _fit(lora: LoraFile, grown: GrownBlocks, depth: int, model: Path | str) -> LoraFile:
    """Map a LoRA's blocks to those of a model with `depth` blocks; raise CheckpointError if impossible."""
    numbers = _numbers_in(lora.modules(), [grown.blocks])
    source = read_depth(lora, grown)
    # without a known depth, a LoRA is taken to be for the first variant; other models need to be told apart
    fits_unseen = source is None and depth not in grown.depths[1:]
    if not numbers or not depth or source == depth or fits_unseen:
        return lora
    if source is None:
        raise CheckpointError(
            f"{lora.path} changes blocks {min(numbers)} to {max(numbers)} and does not say for how many "
            f"blocks it is, {model} has {depth}. Give a LoRA with {grown.keys[0]} in its metadata, or one of "
            "all blocks.",
            lora.path,
        )
    if source > depth or source not in grown.depths or depth not in grown.depths:
        raise CheckpointError(
            f"{lora.path} is for {source} blocks, {model} has {depth}: blocks of the same number are not the "
            f"same there. Use the model with {source} blocks.",
            lora.path,
        )
    blocks = grown.map_blocks(source, depth)
    tensors = {}
    for name, tensor in lora.tensors.items():
        match = re.match(rf"({OURS}{re.escape(grown.blocks)}_)(\d+)(_.*)", name)
        if match is None:
            tensors[name] = tensor
            continue
        for index in blocks[int(match[2])]:
            tensors[f"{match[1]}{index}{match[3]}"] = tensor
    logger.info(
        "%s is for %d blocks, the model has %d: what a block has learned is used in its copies too",
        lora.path,
        source,
        depth,
    )
    return replace(lora, tensors=tensors, metadata={**lora.metadata, grown.keys[0]: str(depth)})
