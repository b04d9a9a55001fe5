"""How much of each LoRA is left if a model's weights are rounded to the nearest after a merge.

It is measured on a sample of rows of each weight, as `networks.rounding` does while merging.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from networks.apply import LoraPatch
from networks.loading import WeightedLora
from networks.rounding import RoundingLoss

MEASURED_DTYPES = (torch.bfloat16, torch.float8_e4m3fn)  # what merged weights are rounded to
_FULL = frozenset({torch.float32, torch.float16, torch.bfloat16})
KeptShares = dict[torch.dtype, dict[Path, float]]  # dtype -> LoRA file -> fraction of its change that is left


def measure_kept_shares(model: Path, weighted_loras: Sequence[WeightedLora]) -> KeptShares:
    """Return the fraction of each LoRA's change that is left if all of them are merged and rounded together.

    The fraction is the projection of the rounded change on the exact one. 8-bit weights have a scale for each
    tensor, so that its largest value is the largest of the dtype.

    Args:
        model: Transformer file with 16- or 32-bit weights.
        weighted_loras: LoRA files with their strengths.

    Raises:
        CheckpointError: If a LoRA does not fit the model, or if its weights are stored in 8 or 4 bits.
    """
    losses: dict[torch.dtype, dict[Path, RoundingLoss]] = {dtype: {} for dtype in MEASURED_DTYPES}
    with open_checkpoint(model) as checkpoint:
        patch = LoraPatch(weighted_loras, checkpoint.tensors, model)
        changed = [name for name in checkpoint.tensors if patch.changes_parameter(name)]
        patch.reject_misfits()
        stored = {checkpoint.tensors[name].dtype for name in changed}
        if not stored <= _FULL or any(checkpoint.tensors[name].packing is not None for name in changed):
            raise CheckpointError(
                f"--dit {model} has weights in 8 or 4 bits, whose rounding cannot be measured.\n  Pass the "
                "file with 16-bit weights that it was made from.",
                model,
            )
        for name in changed:
            weight = checkpoint.read(name)
            sample = patch.sample_changes(name, weight)
            if sample is None:  # a weight that is replaced
                continue
            for dtype, by_file in losses.items():
                scale = 1.0
                if dtype.itemsize == 1:
                    scale = float(weight.float().abs().max()) / torch.finfo(dtype).max or 1.0
                for path, loss in sample.losses(dtype, scale).items():
                    total = by_file.setdefault(path, RoundingLoss())
                    total.error_dot_change += loss.error_dot_change / sample.sampled_fraction
                    total.squared_change += loss.squared_change / sample.sampled_fraction
    return {
        dtype: {path: loss.kept_share for path, loss in by_file.items()} for dtype, by_file in losses.items()
    }
