"""Write a LoRA with other strengths of its blocks, or with blocks of a second LoRA."""

import json
from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

from checkpoints.writing import save_tensors
from modules.console import format_count
from modules.errors import CheckpointError, OptionError
from modules.options import Options, option
from modules.text_files import parse_json
from networks.block_strengths import resolve_strengths, scale_blocks, scale_modules
from networks.loading import read_lora
from networks.metadata import STALE, add_hashes
from networks.module_factors import group_by_module, ungroup
from networks.names.layouts import FOLDED
from networks.typed_strengths import GRAMMAR, read_block_strengths

logger = getLogger(__name__)
DONOR_BLOCKS = "--donor_blocks"
HISTORY = "reelsmith_blocks"  # metadata key: JSON list of the changes of a file's blocks, oldest first


class BlockOptions(Options, title="what to write"):
    """Options of tools/blocks.py."""

    model: Path = option("LoRA file of any dialect", positional=True, place="there")
    lora_blocks: str | None = option(f"strength of each block: {GRAMMAR}")
    donor: Path | None = option(
        "LoRA file whose blocks replace those of the first", place="there", needs="donor_blocks"
    )
    donor_blocks: str | None = option(
        "blocks to take from --donor, and their strength: 10-19=1", needs="donor"
    )
    output: Path = option(
        "safetensors file to write, under the names that musubi-tuner uses",
        place="safetensors",
        must_not_replace="model",
        required=True,
    )

    def __post_init__(self) -> None:
        if self.lora_blocks is None and self.donor is None:
            raise OptionError("nothing would change: pass --lora_blocks, or --donor and --donor_blocks")
        if self.lora_blocks is not None:
            read_block_strengths(self.lora_blocks)
        if self.donor_blocks is not None:
            read_block_strengths(self.donor_blocks, DONOR_BLOCKS)


def rewrite_blocks(options: BlockOptions) -> None:
    """Write the new file, completely or not at all.

    Raises:
        OptionError: If the texts name blocks that a file lacks, or if a change cannot be scaled.
        CheckpointError: If a file is no LoRA, or if the donor changes other modules.
    """
    lora = read_lora(options.model, with_texts=True)
    tensors = dict(lora.tensors)
    change = {"model": options.model.name}
    if options.lora_blocks is not None:
        tensors = scale_blocks(tensors, options.lora_blocks, options.model)
        change["lora_blocks"] = options.lora_blocks
    if options.donor is not None and options.donor_blocks is not None:
        donor_modules = group_by_module(read_lora(options.donor).tensors)
        strength_by_module = resolve_strengths(
            donor_modules, options.donor_blocks, options.donor, DONOR_BLOCKS
        )
        taken = strength_by_module.keys()
        if not taken & group_by_module(lora.tensors).keys():
            raise CheckpointError(
                f"{options.donor}: its blocks of --donor_blocks have none of the modules of {options.model}. "
                "The files are for different models",
                options.donor,
            )
        # what the donor leaves out (strength 0) is left out of the result too
        kept = {name: factors for name, factors in group_by_module(tensors).items() if name not in taken}
        replacing = {name: factors for name, factors in donor_modules.items() if name in taken}
        scaled = scale_modules(replacing, strength_by_module, options.donor, DONOR_BLOCKS)
        tensors = ungroup({**kept, **scaled})
        change |= {"donor": options.donor.name, "donor_blocks": options.donor_blocks}
    if not tensors:
        raise OptionError("nothing of the LoRA would be left: every block has the strength 0")
    tensors |= lora.text_tensors
    metadata = {key: text for key, text in lora.metadata.items() if not key.startswith(STALE)}
    metadata.pop(FOLDED, None)  # alpha / rank by old rank, already multiplied into the factors
    metadata[HISTORY] = json.dumps([*_read_history(metadata), change], ensure_ascii=False)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(options.output, contiguous, add_hashes(contiguous, metadata))
    num_modules = len(group_by_module(tensors))
    logger.info("%s: %s", options.output, format_count(num_modules, "module"))


def _read_history(metadata: Mapping[str, str]) -> list[Any]:
    """Return the earlier changes of a file's blocks; none if its metadata has something else there."""
    try:
        history = parse_json(metadata.get(HISTORY, "[]"))
    except ValueError:
        return []
    return history if isinstance(history, list) else []
