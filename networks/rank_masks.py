"""T-LoRA: the noisier a sample is, the fewer ranks of a LoRA act on it.

A LoRA that sees much noise learns the few pictures by heart first, so at high levels only its first ranks
act. The file is an ordinary LoRA; its metadata say with which rule it was trained. Loops set the levels of a
pass with `set_levels` before it, and they stay until the next pass: recomputing a checkpointed block in the
backward pass has the masks of its forward pass.

Source: Soboleva et al. 2025, arXiv 2507.05964.
"""
# Letters: S samples, R rank

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from modules.text_files import parse_json
from networks.kinds.tlora import ALPHA as TLORA_ALPHA
from networks.kinds.tlora import MIN_RANK as TLORA_MIN_RANK
from networks.kinds.tlora import SWITCH as TLORA

_MASKS = "_rank_masks"  # attribute of a network
_ROUNDING = 1e-4  # (1 - 0.3) * 10 is a little less than 7 in float32


@dataclass(frozen=True)
class RankRule:
    """How many ranks act: floor((1 - level)^power * (R - least)) + least."""

    least: int = 1  # at pure noise
    power: float = 1.0

    def in_words(self) -> str:
        """Return the rule as --network_args has it."""
        return f"{TLORA}=True {TLORA_MIN_RANK}={self.least} {TLORA_ALPHA}={self.power:g}"

    def active(self, rank: int, levels: Tensor) -> Tensor:
        """Return the number of active ranks of each sample, S. levels: S, shares of noise, 0 to 1."""
        least = min(self.least, rank)
        shares = (1 - levels.float()).clamp(0, 1) ** self.power
        return (shares * (rank - least) + _ROUNDING).floor() + least


class RankMask:
    """Which ranks of the LoRAs of one size act in the current pass of a network."""

    def __init__(self, rule: RankRule, rank: int, num_parts: int = 1) -> None:
        """num_parts: of equal ranks, one after the other, whose first ranks act. rank: of all together."""
        self.rule = rule
        self.rank = rank
        self.num_parts = num_parts
        self.rows: Tensor | None = None  # S x R, or 1 x R for equal levels; booleans

    def set_levels(self, levels: Tensor) -> None:
        rank = self.rank // self.num_parts
        numbers = torch.arange(rank, device=levels.device)
        rows = numbers < self.rule.active(rank, levels)[:, None]
        self.rows = rows.repeat(1, self.num_parts)

    def apply(self, hidden: Tensor, axis: int = -1) -> Tensor:
        """Return values between the factors with those of the ranks that do not act set to 0.

        hidden: B ... R, or B R ... with `axis` 1. B is S, or S times the rows that each sample has.
        """
        rows = self.rows
        assert rows is not None, "the levels of a pass are set before it"
        if len(rows) > 1 and len(rows) != len(hidden):
            per_sample, rest = divmod(len(hidden), len(rows))
            assert not rest, f"{len(hidden)} rows are not those of {len(rows)} samples"
            rows = rows.repeat_interleave(per_sample, 0)
        shape = [1] * hidden.ndim
        shape[0] = len(rows)
        shape[axis] = rows.shape[1]
        return hidden * rows.view(shape).to(hidden.dtype)


def mask_for(network: nn.Module, rule: RankRule, rank: int, num_parts: int = 1) -> RankMask:
    """Return the mask of a network's LoRAs of a size, whose levels `set_levels` sets."""
    masks: dict[tuple[RankRule, int, int], RankMask] = network.__dict__.setdefault(_MASKS, {})
    return masks.setdefault((rule, rank, num_parts), RankMask(rule, rank, num_parts))


def set_levels(network: nn.Module, levels: Tensor) -> None:
    """Set the levels of the next pass of a network; do nothing if it has no masks.

    levels: S, the share of noise of each sample; a single one is for all.
    """
    # its own fields: a module looks for what it lacks in three more places, in each step of every training
    masks: Mapping[Any, RankMask] | None = network.__dict__.get(_MASKS)
    for mask in masks.values() if masks else ():
        mask.set_levels(levels)


def set_level(network: nn.Module, level: float, device: torch.device) -> None:
    """Set the same level for all samples of the next pass, as `set_levels`. device: to compute on."""
    if network.__dict__.get(_MASKS):
        set_levels(network, torch.full((1,), level, device=device))


def rule_of(metadata: Mapping[str, str], path: Path | None = None) -> RankRule | None:
    """Return the rule that a LoRA was trained with, as its metadata say; None: all ranks act.

    path: of the file, for messages. Raises CheckpointError if its numbers cannot be read.
    """
    text = metadata.get("ss_network_args", "")
    if TLORA not in text:
        return None
    try:
        arguments = dict(parse_json(text))
    except (ValueError, TypeError, RecursionError):
        return None  # another program's, whose arguments may have any form
    if str(arguments.get(TLORA, "")).lower() != "true":
        return None
    usual = RankRule()
    least_text = arguments.get(TLORA_MIN_RANK, usual.least)
    power_text = arguments.get(TLORA_ALPHA, usual.power)
    try:
        rule = RankRule(int(least_text), float(power_text))
    except (ValueError, TypeError, OverflowError):
        rule = RankRule(0)
    if rule.least < 1 or not 0 < rule.power < math.inf:
        raise CheckpointError(
            f"{path or 'a LoRA'}: its metadata say {TLORA}=True with {TLORA_MIN_RANK}={least_text!r} and "
            f"{TLORA_ALPHA}={power_text!r}, which are no rank from 1 and no number above 0. Copy it again.",
            path,
        )
    return rule


def parts_of_rank(metadata: Mapping[str, str], rank: int) -> int:
    """Return how many LoRAs of the trained rank were joined to one of this rank, as those of q, k and v are.

    Where modules have ranks of their own it is 1: these files are joined nowhere here.
    """
    trained = metadata.get("ss_network_dim", "")
    arguments = metadata.get("ss_network_args", "")
    if not trained.isdecimal() or int(trained) < 1 or "_dim" in arguments or rank % int(trained):
        return 1
    return rank // int(trained)


MERGED = "was trained with T-LoRA: merged, all of its ranks act at every level of noise, unlike in training"
ELSEWHERE = (
    "A T-LoRA acts as trained in the scripts here, which read its rule and mask its ranks at each step. "
    "Other programs have no mask, and merging has none either: all ranks act at every level of noise."
)


def has_rule(paths: Iterable[Path]) -> bool:
    """Return whether any of these LoRA files was trained with a rule; only their headers are read."""
    for path in paths:
        with open_checkpoint(path) as checkpoint:
            if rule_of(checkpoint.metadata) is not None:
                return True
    return False
