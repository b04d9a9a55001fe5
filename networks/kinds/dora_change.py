"""The change of a weight by a DoRA, and its norms: a heavy half of `dora.py`."""

import torch
from torch import Tensor


def decompose(weight: Tensor, delta: Tensor, magnitudes: Tensor, by_frozen_norms: bool = False) -> Tensor:
    """Return DoRA's addition to a weight at multiplier 1, float32.

    The sum of weight and delta gets new norms, by output or by input: `magnitudes * sum / norm - weight`.
    Multipliers scale this difference, so that 0 changes nothing. weight, delta: out x in (x kernel).
    magnitudes: out x 1 (x 1 ...) or 1 x in (x 1 ...). by_frozen_norms: those by output are divided by the
    norms of the weight alone, as ComfyUI does.
    """
    weight = weight.float()
    magnitudes = magnitudes.to(weight.device, torch.float32)
    changed = weight + delta.reshape(weight.shape)
    axis = 1 if len(magnitudes) < magnitudes.numel() else 0  # 1: by input
    norms = norms_of(weight if by_frozen_norms and not axis else changed, axis)
    return changed.mul_(magnitudes.reshape(norms.shape) / norms).sub_(weight)


def norms_of(weight: Tensor, axis: int = 0) -> Tensor:
    """Return a weight's norms by output (axis 0) or input (axis 1), float32, never 0."""
    summed_axes = [place for place in range(weight.ndim) if place != axis]
    norms = torch.linalg.vector_norm(weight, dim=summed_axes, keepdim=True, dtype=torch.float32)
    return norms + torch.finfo(torch.float32).eps  # as LyCORIS and ComfyUI have it
