"""Find cuts with PySceneDetect, an optional package that is shown the same pictures as our own detector."""

import importlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from data_tools.cutting.changes import CUT, ChangeDetector, SceneChange
from data_tools.cutting.options import CONTENT
from modules.errors import InstallationError
from modules.media.depth import Pixels, in_eight_bits

WIDTH = 256  # to which PySceneDetect itself reduces pictures


def load_pyscenedetect(detector: str, threshold: float) -> Callable[[float], ChangeDetector]:
    """Return a function that makes a detector for a video of so many pictures a second.

    Raises InstallationError if PySceneDetect is missing, or older than 0.7, whose detectors take numbers.
    """
    try:
        package: Any = importlib.import_module("scenedetect")
    except ImportError:
        raise InstallationError(
            f"--detector {detector} needs PySceneDetect: pip install scenedetect-headless (not scenedetect: "
            "it brings opencv-python, which clashes with opencv-python-headless). Or use --detector own."
        ) from None
    if not hasattr(package, "TimecodeLike"):
        raise InstallationError(
            f"--detector {detector} needs PySceneDetect 0.7 or newer, here is {package.__version__}: "
            "pip install -U scenedetect-headless"
        )

    def make(rate: float) -> ChangeDetector:
        if detector == CONTENT:
            return PySceneDetect(package, package.ContentDetector(threshold=threshold), rate)
        return PySceneDetect(package, package.AdaptiveDetector(adaptive_threshold=threshold), rate)

    return make


class PySceneDetect:
    """Shows pictures to a detector of PySceneDetect, with its own defaults but for the threshold."""

    def __init__(self, package: Any, detector: Any, rate: float) -> None:
        self._package, self._detector, self._rate = package, detector, rate
        self._count = 0
        self._found: set[int] = set()

    def see(self, pixels: Pixels) -> None:
        """Look at the next picture, H W 3."""
        factor = min(1.0, WIDTH / pixels.shape[1])
        size = max(1, round(pixels.shape[1] * factor)), max(1, round(pixels.shape[0] * factor))
        small = cv2.resize(in_eight_bits(pixels), size, interpolation=cv2.INTER_AREA)
        blue_first = np.ascontiguousarray(small[..., ::-1])
        self._note(self._detector.process_frame(self._time(self._count), blue_first))
        self._count += 1

    def changes(self) -> list[SceneChange]:
        """Return the cuts, in order."""
        if self._count:
            self._note(self._detector.post_process(self._time(self._count - 1)))
        return [SceneChange(number, number, CUT) for number in sorted(self._found)]

    def _time(self, number: int) -> Any:
        # of an even rate, whatever the times in the file are: it stands for the number of the picture
        return self._package.FrameTimecode(number, self._rate)

    def _note(self, times: Any) -> None:
        self._found |= {int(time.frame_num) for time in times}
