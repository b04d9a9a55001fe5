"""The transition from one clip to the next where both show the same moments."""

import torch
from torch import Tensor


def cross_fade(earlier: Tensor, later: Tensor) -> Tensor:
    """From all of `earlier` at the first frame to all of `later` at the last, linearly; computed in float32.

    earlier, later: B C F H W, the frames that both clips show. Returns the dtype of `later`.
    """
    weights = torch.linspace(1, 0, later.shape[2], dtype=torch.float32, device=later.device).view(
        1, 1, -1, 1, 1
    )
    return (weights * earlier.float() + (1 - weights) * later.float()).to(later.dtype)
