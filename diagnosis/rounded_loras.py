"""Findings about LoRAs of which little is left once they are merged and rounded to the model's dtype."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_tools.report.diagnosis.finding import Finding
from networks.kept_shares import MEASURED_DTYPES, measure_kept_shares
from networks.loading import WeightedLora, read_lora

KEPT = 0.9  # fraction of a LoRA's change that should be left in 16-bit weights
LOST_BESIDE = 0.05  # fraction that is lost only because another LoRA is merged too
NAMES = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8"}


@dataclass(frozen=True)
class RoundedLora:
    """What is left of a LoRA that is merged and rounded to the nearest values of a dtype."""

    path: Path
    dtype: torch.dtype
    alone: float  # fraction of its change
    other: Path | None = None  # a LoRA that is merged in the same sum
    together: float | None = None  # fraction of its change if both are merged

    def describe(self) -> str:
        """Return a sentence with the figures."""
        beside = "" if self.other is None else f", and {self.together:.1%} together with {self.other.name}"
        return (
            f"Merged and rounded to the nearest {NAMES[self.dtype]} value, {self.path.name} keeps "
            f"{self.alone:.1%} of its change{beside}."
        )


def measure_rounded_loras(dit: Path, multipliers: Mapping[Path, float]) -> list[RoundedLora]:
    """Measure what is left of one or two LoRA files in the weights of a transformer, by dtype and file.

    Args:
        dit: Transformer file with 16-bit weights.
        multipliers: Strengths of the files, by path.

    Raises:
        CheckpointError: If a file cannot be read or does not fit, or if the transformer is stored in 8 bits.
    """
    paths = list(multipliers)
    loras = [WeightedLora(read_lora(path), multiplier) for path, multiplier in multipliers.items()]
    alone = [measure_kept_shares(dit, [lora]) for lora in loras]
    together = measure_kept_shares(dit, loras) if len(loras) > 1 else None
    rounded = []
    for dtype in MEASURED_DTYPES:
        for index, path in enumerate(paths):
            if path not in alone[index][dtype]:  # nothing of it is added to a weight
                continue
            other = None if together is None else paths[1 - index]
            share = None if together is None else together[dtype][path]
            rounded.append(RoundedLora(path, dtype, alone[index][dtype][path], other, share))
    return rounded


def find_rounding_findings(rounded: Sequence[RoundedLora]) -> Iterator[Finding]:
    """Yield findings about LoRAs that 16-bit weights cannot hold, alone or beside a second one."""
    for lora in rounded:
        if lora.dtype != torch.bfloat16:  # 8-bit layers are left unmerged here: the figure is for others
            continue
        if lora.alone < KEPT:
            yield Finding(
                "lora-rounded",
                lora.path.name,
                figure=lora.alone,
                limit=KEPT,
                text=f"Only {lora.alone:.0%} of the change of {lora.path.name} is left if it is merged and "
                "rounded to the nearest bf16 value.",
                meaning="Its changes are smaller than the distance between two such numbers.",
                remedy="Merge with --lora_rounding auto, the default here, which keeps all of it on average; "
                "in other programs, load the LoRA without merging it.",
            )
        if lora.other is not None and lora.together is not None and lora.together < lora.alone - LOST_BESIDE:
            yield Finding(
                "loras-rounded",
                lora.path.name,
                figure=lora.alone - lora.together,
                limit=LOST_BESIDE,
                text=f"{lora.path.name} keeps {lora.alone:.0%} of its change in bf16 weights, and "
                f"{lora.together:.0%} if {lora.other.name} is merged too.",
                meaning="The weights become larger with the other LoRA, and their numbers lie further apart.",
                remedy="Merge with --lora_rounding auto or stochastic, or load one of the two unmerged.",
            )
