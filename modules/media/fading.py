"""The transition between two clips over the frames that they share."""

import torch
from torch import Tensor


def cross_fade(earlier: Tensor, later: Tensor) -> Tensor:
    """Blend linearly from `earlier` at the first frame to `later` at the last; computed in float32.

    earlier, later: B C F H W, the frames that both clips share. Returns the dtype of `later`.
    """
    weights = torch.linspace(1, 0, later.shape[2], dtype=torch.float32, device=later.device).view(
        1, 1, -1, 1, 1
    )
    return (weights * earlier.float() + (1 - weights) * later.float()).to(later.dtype)
