"""What an estimator of optical flow is to the interpolation."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class EncodedPicture:
    """What one picture gives alone: computed once, used by both pairs that the picture belongs to.

    All maps are float32. H and W are the sides of the picture.
    """

    quarter: Tensor  # 1 C H/4 W/4, features that the synthesis warps
    eighth: Tensor  # 1 C H/8 W/8, the same, coarser and deeper
    matching: Tensor  # 1 C H/8 W/8, features that are compared between pictures
    own: Any  # what only the estimator that made it knows


class FlowEstimator(Protocol):
    """Estimate the motion between two pictures, in float32."""

    def encode(self, image: Tensor) -> EncodedPicture:
        """Return what a picture gives alone. image: 1 3 H W, 0..255, float32, sides multiples of 32."""

    def flow(self, first: EncodedPicture, second: EncodedPicture) -> Tensor:
        """Return 1 2 H W, float32: how far in x and y each pixel of the first picture moves to the second."""
