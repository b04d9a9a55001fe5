"""Mask ranks of LoRAs by the noise level of each sample (T-LoRA).

A file's metadata contains the rule it was trained with. Training and sampling call `set_levels` before each
pass. The levels stay until the next pass, so a checkpointed block is recomputed with the same masks.
"""
# Letters: S samples, R rank

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.opening import open_checkpoint
from networks.kinds.composing import VARIANTS
from networks.kinds.contract import RankRule

_MASKS = "_rank_masks"  # attribute of a network


class RankMask:
    """Mask of the ranks that T-LoRA activates in the current forward pass, shared by LoRAs of equal rank."""

    def __init__(self, rule: RankRule, rank: int, num_parts: int = 1) -> None:
        """Start without a mask; `set_levels` computes it before each forward pass.

        Args:
            rule: Number of active ranks as a function of the noise level.
            rank: Rank of the LoRA.
            num_parts: Number of LoRAs of equal rank that were joined; the first ranks of each are active.
        """
        self.rule = rule
        self.rank = rank
        self.num_parts = num_parts
        self.masks: Tensor | None = None  # S x R, or 1 x R for equal levels; booleans

    def set_levels(self, levels: Tensor) -> None:
        """Compute the rank mask of each sample for the next forward pass from noise levels, S."""
        rank = self.rank // self.num_parts
        indices = torch.arange(rank, device=levels.device)
        is_active = indices < self.rule.active(rank, levels)[:, None]  # S x rank
        self.masks = is_active.repeat(1, self.num_parts)

    def apply(self, hidden: Tensor, axis: int = -1) -> Tensor:
        """Return the output of the down factor with the values of inactive ranks set to 0.

        Args:
            hidden: Values, B x ... x R, or B x R x ... if `axis` is 1. B is the number of samples S, or a
                multiple of S if each sample has several rows.
            axis: Axis of the ranks.
        """
        masks = self.masks
        assert masks is not None, "the noise levels must be set before each pass"
        is_mask_per_sample = len(masks) > 1
        if is_mask_per_sample and len(masks) != len(hidden):
            rows_per_sample, remainder = divmod(len(hidden), len(masks))
            assert not remainder, f"{len(hidden)} rows are not those of {len(masks)} samples"
            masks = masks.repeat_interleave(rows_per_sample, 0)
        shape = [1] * hidden.ndim
        shape[0] = len(masks)
        shape[axis] = masks.shape[1]
        return hidden * masks.view(shape).to(hidden.dtype)


def mask_for(network: nn.Module, rule: RankRule, rank: int, num_parts: int = 1) -> RankMask:
    """Return a network's mask for LoRAs of this rank; `set_levels` sets its noise levels.

    `num_parts` is the number of LoRAs of equal rank that were joined into each LoRA.
    """
    masks: dict[tuple[RankRule, int, int], RankMask] = network.__dict__.setdefault(_MASKS, {})
    return masks.setdefault((rule, rank, num_parts), RankMask(rule, rank, num_parts))


def set_levels(network: nn.Module, levels: Tensor) -> None:
    """Set the noise levels for the network's next forward pass; do nothing if it has no rank masks.

    Args:
        network: The network.
        levels: Noise level of each sample, S; a single level applies to all samples.
    """
    # not getattr, which is slow for attributes that a module lacks, in each step of every training run
    masks: Mapping[Any, RankMask] | None = network.__dict__.get(_MASKS)
    for mask in masks.values() if masks else ():
        mask.set_levels(levels)


def set_level(network: nn.Module, level: float, device: torch.device) -> None:
    """Set the same noise level for all samples of the next forward pass.

    Args:
        network: The network.
        level: Noise level, 0 to 1.
        device: Device to compute on.
    """
    if network.__dict__.get(_MASKS):
        set_levels(network, torch.full((1,), level, device=device))


def read_rank_rule(metadata: Mapping[str, str], path: Path | None = None) -> RankRule | None:
    """Return the rank rule (T-LoRA) in a LoRA's metadata; None if all ranks are always active.

    Args:
        metadata: Metadata of the file.
        path: Path of the file, for messages.

    Raises:
        CheckpointError: If the values of the rule cannot be read.
    """
    arguments = metadata.get("ss_network_args", "")
    for kind in VARIANTS:
        # arguments are JSON text: a quick test before it is parsed
        if kind.switch in arguments:
            rule = kind.read_rule_of_file(metadata, path)
            if rule is not None:
                return rule
    return None


def count_joined_parts(metadata: Mapping[str, str], rank: int) -> int:
    """Return how many LoRAs of the trained rank were joined into one of this rank, such as 3 for q, k and v.

    Returns 1 if modules were trained with different ranks, because such modules are never joined.
    """
    trained_rank = metadata.get("ss_network_dim", "")
    has_several_ranks = "_dim" in metadata.get("ss_network_args", "")
    if not trained_rank.isdecimal() or int(trained_rank) < 1 or has_several_ranks:
        return 1
    num_joined, remainder = divmod(rank, int(trained_rank))
    return 1 if remainder else num_joined


def has_rule(paths: Iterable[Path]) -> bool:
    """Return whether any of these LoRA files was trained with a rank rule (T-LoRA); reads only headers."""
    for path in paths:
        with open_checkpoint(path) as checkpoint:
            if read_rank_rule(checkpoint.metadata) is not None:
                return True
    return False
