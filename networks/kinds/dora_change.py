"""Compute DoRA's change of a weight; the part of `dora.py` that imports torch."""

import torch
from torch import Tensor

from networks.kinds.algebra import Algebra, compute_norms, is_by_input
from networks.kinds.factors import Factors


class DoraAlgebra(Algebra):
    """DoRA magnitudes: new row or column norms for the sum of weight and change."""

    def __init__(self, factor_name: str) -> None:
        """Set the name of the tensor with the magnitudes, such as `dora_scale`."""
        self.factor_name = factor_name
        self.magnitudes = self  # this class implements the protocol `Magnitudes` too

    def find_error(self, factors: Factors) -> str | None:
        """Return an error message unless there is one magnitude per row or one per column; otherwise None."""
        shape = factors[self.factor_name].shape
        if len(shape) < 2 or shape.numel() not in shape[:2]:
            return f"its {self.factor_name} has the shape {list(shape)}"
        return None

    def find_factors_with_rows(self, factors: Factors) -> set[str] | None:
        """Return the factors with one value per row: the magnitudes, or none if they are per column."""
        return set() if is_by_input(factors[self.factor_name]) else {self.factor_name}

    def select_rows(self, factors: Factors, rows: slice | Tensor) -> Factors | None:
        """Return the magnitudes of some rows; None if they are per input, because all rows share these."""
        magnitudes = factors[self.factor_name]
        return None if is_by_input(magnitudes) else {self.factor_name: magnitudes[rows]}

    def decompose(self, weight: Tensor, delta: Tensor, magnitudes: Tensor, uses_frozen_norms: bool) -> Tensor:
        """Return the float32 addition that rescales the changed weight to the trained magnitudes."""
        return decompose(weight, delta, magnitudes, uses_frozen_norms)


def decompose(weight: Tensor, delta: Tensor, magnitudes: Tensor, uses_frozen_norms: bool = False) -> Tensor:
    """Return DoRA's float32 addition to a weight at multiplier 1.

    The sum of weight and delta gets new row or column norms: `magnitudes * sum / norm - weight`. Multipliers
    scale this difference, so that 0 changes nothing.

    Args:
        weight: Frozen weight, out x in (x kernel).
        delta: Change of the weight, of the same shape.
        magnitudes: New norms, out x 1 (x 1 ...) or 1 x in (x 1 ...).
        uses_frozen_norms: Whether row norms are divided by the frozen weight's norms, as in ComfyUI.
    """
    weight = weight.float()
    magnitudes = magnitudes.to(weight.device, torch.float32)
    changed = weight + delta.reshape(weight.shape)
    # axis with one norm per index
    axis = 1 if is_by_input(magnitudes) else 0
    uses_frozen = uses_frozen_norms and axis == 0  # ComfyUI does so only for row norms
    norms = compute_norms(weight if uses_frozen else changed, axis)
    return changed.mul_(magnitudes.reshape(norms.shape) / norms).sub_(weight)
