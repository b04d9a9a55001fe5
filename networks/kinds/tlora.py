"""T-LoRA: the noisier a sample is, the fewer ranks of a LoRA are active.

On few images, a LoRA overfits first at high noise levels, so only its first ranks are active there. The file
is an ordinary LoRA whose metadata contains the rule it was trained with. `networks/rank_masks.py` masks the
ranks in each pass.
Source: Soboleva et al. 2025, arXiv 2507.05964.
"""
# Letters: S samples, R rank

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modules.errors import CheckpointError, OptionError
from modules.text_files import parse_json
from networks.kinds.contract import NetworkKind

if TYPE_CHECKING:  # --help must not import torch
    from pathlib import Path

    from torch import Tensor

# keys of --network_args
SWITCH = "tlora"
MIN_RANK = "tlora_min_rank"
ALPHA = "tlora_alpha"
_ROUNDING = 1e-4  # added before rounding down, because (1 - 0.3) * 10 is a little less than 7 in float32


@dataclass(frozen=True)
class TLoraRule:
    """Number of active ranks out of R in T-LoRA: floor((1 - noise level)^power * (R - minimum)) + minimum."""

    minimum: int = 1  # number of active ranks at pure noise
    power: float = 1.0

    @property
    def kind(self) -> NetworkKind:
        """The network kind T-LoRA."""
        return TLORA

    def in_words(self) -> str:
        """Return the rule as it is written in --network_args."""
        return f"{SWITCH}=True {MIN_RANK}={self.minimum} {ALPHA}={self.power:g}"

    def explain_merging(self, path: "Path") -> str:
        """Return a warning that says what is lost if the file of a T-LoRA is merged."""
        return (
            f"{path} was trained with T-LoRA: merged, all ranks are active at every noise level, unlike in "
            "training"
        )

    def active(self, rank: int, levels: "Tensor") -> "Tensor":
        """Return the number of active ranks for each sample, S.

        Args:
            rank: Rank of the LoRA.
            levels: Noise level of each sample, S, from 0 to 1.
        """
        minimum = min(self.minimum, rank)
        fractions = (1 - levels.float()).clamp(0, 1) ** self.power
        return (fractions * (rank - minimum) + _ROUNDING).floor() + minimum


class TLoraKind(NetworkKind):
    """T-LoRA: a LoRA whose number of active ranks depends on the noise level of each sample."""

    name = "T-LoRA"
    switch = SWITCH
    numbers = {MIN_RANK: int, ALPHA: float}
    is_with_file = True

    def read_rule_of_arguments(self, values: Mapping[str, Any], rank: int) -> TLoraRule | None:
        """Return the T-LoRA rule that --network_args describe; None unless T-LoRA is switched on.

        Raises:
            OptionError: If other arguments are set without the switch, or if all ranks would be active at all
                noise levels.
        """
        if not values.get(SWITCH, False):
            unused = next((name for name in (MIN_RANK, ALPHA) if name in values), None)
            if unused is not None:
                raise OptionError(f"--network_args {unused} is for T-LoRA: add {SWITCH}=True, or omit it")
            return None
        default = TLoraRule()
        minimum = values.get(MIN_RANK, default.minimum)
        if minimum > rank:
            raise OptionError(
                f"--network_args {MIN_RANK}={minimum}: the rank is {rank}, and at least that many ranks "
                "would be active at all noise levels. Use less than --network_dim, such as "
                f"{default.minimum}"
            )
        power = values.get(ALPHA, default.power)
        # active ranks grow with (1 - level)^power, which is 1 at every level if the power is 0
        if not power:
            raise OptionError(
                f"--network_args {ALPHA}=0: all ranks would be active at all noise levels. Use more than 0; "
                f"{default.power:g} is usual"
            )
        return TLoraRule(minimum, power)

    def read_rule_of_file(self, metadata: Mapping[str, str], path: "Path | None") -> TLoraRule | None:
        """Return T-LoRA's rule from a file's metadata; None if all ranks are always active.

        Raises:
            CheckpointError: If a value of the rule cannot be read or is out of range.
        """
        text = metadata["ss_network_args"]  # the caller has found SWITCH in it

        try:
            arguments = dict(parse_json(text))
        except (ValueError, TypeError, RecursionError):
            return None  # written by another program in a different format
        if str(arguments.get(SWITCH, "")).lower() != "true":
            return None
        default = TLoraRule()
        min_text = arguments.get(MIN_RANK, default.minimum)
        power_text = arguments.get(ALPHA, default.power)
        rule: TLoraRule | None = None
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            rule = TLoraRule(int(min_text), float(power_text))
        if rule is None or rule.minimum < 1 or not 0 < rule.power < math.inf:
            raise CheckpointError(
                f"{path or 'a LoRA'}: its metadata says {SWITCH}=True with {MIN_RANK}={min_text!r} and "
                f"{ALPHA}={power_text!r}, not a rank of at least 1 and a number above 0. Copy it again.",
                path,
            )
        return rule


TLORA = TLoraKind()
