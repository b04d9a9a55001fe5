"""Strengths of a LoRA by block: `0-9=0.5, 30-=0`. A block with strength 0 is left out.

Alphas are scaled, so that a file with scaled alphas gives the same results to the bit as the strengths do.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from modules.errors import OptionError
from networks.delta import Delta, read_delta
from networks.kinds.factors import Factors
from networks.module_factors import BIAS_FACTORS, SET_WEIGHT, get_lora_rank, group_by_module, ungroup
from networks.names.layouts import OURS
from networks.typed_strengths import MAX_BLOCK, OPTION, OTHER, BlockStrength, read_block_strengths

logger = logging.getLogger(__name__)

_BLOCK = re.compile(rf"(?:{OURS})?(?P<list>[a-z_]*?)_?(?P<number>\d+)(?:_|$)")


def split_block_name(module: str) -> tuple[str, int] | None:
    """Return the block list and number of a module, such as ("blocks", 3); None if it is in no block."""
    match = _BLOCK.match(module)
    return (match["list"], int(match["number"])) if match else None


def scale_blocks(tensors: Mapping[str, Tensor], text: str, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a LoRA whose blocks have the strengths in `text`; others keep the strength 1.

    Args:
        tensors: Tensors under our names, `lora_unet_blocks_0_self_attn_q.lora_down.weight`.
        text: Value of --lora_blocks for this LoRA.
        path: The LoRA file, for messages.

    Raises:
        OptionError: If the text names blocks that the file lacks, or if a change cannot be scaled.
    """
    modules = group_by_module(tensors)
    return ungroup(scale_modules(modules, resolve_strengths(modules, text, path), path))


def scale_modules(
    modules: Mapping[str, Factors],
    strength_by_module: Mapping[str, float],
    path: Path,
    option: str = OPTION,
) -> dict[str, Factors]:
    """Return modules whose changes have the given strengths; those with strength 0 are left out.

    Args:
        modules: The factors of each module, by its name.
        strength_by_module: Strengths; modules that it does not name keep the strength 1.
        path: The LoRA file, for messages.
        option: Option that sets the strengths, for messages.

    Raises:
        OptionError: If a change cannot be scaled.
    """
    scaled: dict[str, Factors] = {}
    for name, factors in modules.items():
        strength_of_module = strength_by_module.get(name, 1.0)
        if strength_of_module == 1:
            scaled[name] = factors
        elif strength_of_module != 0:
            scaled[name] = _scale_factors(factors, strength_of_module, f"{path}: {name}", option)
    return scaled


def resolve_strengths(
    modules: Iterable[str], text: str, path: Path, option: str = OPTION
) -> dict[str, float]:
    """Return the strength of each module that the text names; the last item that names it counts.

    Args:
        modules: Names of the modules.
        text: The strengths as typed.
        path: The LoRA file, for messages.
        option: Option that has the text as its value, for messages.

    Raises:
        OptionError: If the text names blocks that the modules do not have.
    """
    blocks = {name: split_block_name(name) for name in modules}
    lists = sorted({block[0] for block in blocks.values() if block is not None})
    strength_by_module: dict[str, float] = {}
    for strength in read_block_strengths(text, option):
        if strength.block_list is None and len(lists) > 1:
            raise OptionError(
                f"{option} {strength.typed!r}: {path} has blocks of {' and '.join(lists)}. Write "
                f"{lists[0]}:{strength.typed}"
            )
        named = [name for name, block in blocks.items() if _is_named(strength, block)]
        if not named:
            numbers = [block[1] for block in blocks.values() if block is not None]
            present = f"blocks {min(numbers)} to {max(numbers)}" if numbers else "no numbered blocks"
            raise OptionError(
                f"{option} {strength.typed!r} names no block of {path}, which has "
                f"{present}{f' of {lists[0]}' if len(lists) == 1 else ''}. Correct the numbers"
            )
        highest = max((block[1] for name in named if (block := blocks[name])), default=MAX_BLOCK)
        # a text for a deeper model, or for more blocks than the file has
        if highest < strength.last < MAX_BLOCK:
            typed = strength.typed
            logger.warning("%s %r: the last of these blocks in %s is %d", option, typed, path, highest)
        strength_by_module |= dict.fromkeys(named, strength.strength)
    return strength_by_module


def _is_named(strength: BlockStrength, block: tuple[str, int] | None) -> bool:
    if block is None or strength.block_list == OTHER:
        return block is None and strength.block_list == OTHER
    block_list, number = block
    return strength.block_list in (None, block_list) and strength.first <= number <= strength.last


def _scale_factors(factors: Factors, strength: float, where: str, option: str) -> dict[str, Tensor]:
    """Return the factors of a module whose change is `strength` times as large."""
    delta: Delta = read_delta(factors)
    if delta.depends_on_weight or SET_WEIGHT in factors:
        raise OptionError(
            f"{where} is a change that has no strength of its own (DoRA, OFT or a replaced weight): with "
            f"{option} its block can only have the strength 0 or 1"
        )
    scaled = dict(factors)
    rank = get_lora_rank(factors)
    if rank is not None:
        # an alpha of 0 means that there is none
        alpha = float(factors["alpha"]) if "alpha" in factors else 0.0
        scaled["alpha"] = torch.tensor((alpha or rank) * strength)
    elif "lokr_w1" in factors:  # both matrices in full: alpha has no effect
        scaled["lokr_w1"] = factors["lokr_w1"].float() * strength
    for name in ("diff", *BIAS_FACTORS):
        # the bias of an up matrix is scaled by alpha too
        if name in factors and not (rank is not None and name == "lora_up.bias"):
            scaled[name] = factors[name].float() * strength
    return scaled
