"""What a detector finds in a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class FoundFace:
    """One thing that a detector has found, most often a face."""

    # left, top, right, bottom in pixels; it may reach outside the picture
    box: tuple[float, float, float, float]
    score: float  # 0..1
    # 5 2, x and y in pixels: the eyes, left one in the picture first, nose, corners of the mouth;
    # None: the detector does not tell
    landmarks: NDArray[np.float32] | None


class Detector(Protocol):
    """Finds faces, or whatever it was trained for."""

    def find(self, pixels: NDArray[np.uint8], least_score: float) -> Sequence[FoundFace]:
        """Return what it finds in a picture (H W 3, RGB) with at least that score, best first."""
