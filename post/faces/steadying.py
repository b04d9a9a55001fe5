"""Keep the landmarks of faces steady from picture to picture, so that restored faces do not tremble."""

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from post.faces.alignment import eye_distance

# parts of the distance between the eyes: landmarks that moved so far have really moved
MOVED = 0.1
Landmarks = NDArray[np.float32]  # 5 2


class SteadyLandmarks:
    """Damp what detectors tremble by. It remembers the faces of the last picture only.

    Faces go back to where they were cut out, so a landmark a little off displaces nothing.
    """

    def __init__(self, strength: float) -> None:
        """strength: 0 (none) to below 1: the part of the last landmarks that is kept at rest."""
        self._strength = strength
        self._last: list[Landmarks] = []

    def steady(self, found: Sequence[Landmarks]) -> list[Landmarks]:
        """Return the landmarks of the next picture's faces, damped; movement is followed."""
        far = {
            (new, old): _distance(found[new], self._last[old])
            for new, old in product(range(len(found)), range(len(self._last)))
        }
        steadied = list(found)
        olds: set[int] = set()
        news: set[int] = set()
        for (new, old), distance in sorted(far.items(), key=lambda item: item[1]):
            if distance < MOVED and new not in news and old not in olds:
                news.add(new)
                olds.add(old)
                kept = np.float32(self._strength * (1 - distance / MOVED))
                steadied[new] = found[new] + kept * (self._last[old] - found[new])
        self._last = steadied
        return list(steadied)


def _distance(new: Landmarks, old: Landmarks) -> float:
    """Return how far landmarks are from others, in distances between the eyes."""
    return float(np.hypot(*(new - old).T).mean()) / eye_distance(new)
