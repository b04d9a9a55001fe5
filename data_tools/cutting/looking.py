"""Read all pictures of a video once: its scenes, its times, and measures of its pictures."""

from array import array
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from data_tools.cutting.changes import ChangeDetector, SceneChange
from modules.media.depth import Pixels, in_eight_bits
from modules.media.measures import CELLS, brightness, is_black, is_flat, sharpness
from modules.media.streams import shown_frames, source_info

SAMPLE_SECONDS = 0.25  # between two pictures that are measured
BLOCK = 256  # samples


@dataclass(frozen=True)
class PictureMeasures:
    """Measures of one picture."""

    number: int
    brightness: float
    sharpness: float
    is_black: bool
    is_flat: bool
    cells: NDArray[np.uint8]  # h w: luma, 32 cells along the shorter side

    @property
    def reduced(self) -> NDArray[np.uint8]:
        """The cells as a frame, h w 3."""
        return np.broadcast_to(self.cells[..., None], (*self.cells.shape, 3))


class Samples:
    """The samples of a video in order, in few large blocks: small ones would scatter the memory."""

    def __init__(self) -> None:
        self._numbers = array("q")
        self._values: array[float] = array("f")  # brightness and sharpness of each
        self._is_black, self._is_flat = bytearray(), bytearray()
        self._blocks: list[NDArray[np.uint8]] = []  # BLOCK h w

    def add(self, sample: PictureMeasures) -> None:
        """Append a sample; its frame is behind those before it."""
        place = len(self._numbers) % BLOCK
        if place == 0:
            self._blocks.append(np.empty((BLOCK, *sample.cells.shape), np.uint8))
        self._blocks[-1][place] = sample.cells
        self._numbers.append(sample.number)
        self._values.extend((sample.brightness, sample.sharpness))
        self._is_black.append(sample.is_black)
        self._is_flat.append(sample.is_flat)

    def between(self, begin: int, end: int) -> list[PictureMeasures]:
        """Return the samples of the frames from `begin` to before `end`."""
        first, last = (bisect_left(self._numbers, number) for number in (begin, end))
        return [self._sample(place) for place in range(first, last)]

    def _sample(self, place: int) -> PictureMeasures:
        return PictureMeasures(
            self._numbers[place],
            self._values[2 * place],
            self._values[2 * place + 1],
            bool(self._is_black[place]),
            bool(self._is_flat[place]),
            self._blocks[place // BLOCK][place % BLOCK],
        )


@dataclass
class VideoLook:
    """Facts about a video after all of it was read."""

    width: int
    height: int
    rate: float  # pictures a second on average
    starts: "array[float]" = field(default_factory=lambda: array("d"))  # of each picture, in seconds
    end: float = 0.0
    samples: Samples = field(default_factory=Samples)
    changes: list[SceneChange] = field(default_factory=list)

    def time(self, number: int) -> float:
        """Return when a frame begins; for the number behind the last one, when the last ends."""
        return self.starts[number] if number < len(self.starts) else self.end


def look_at(
    path: Path, make: Callable[[float], ChangeDetector], black_threshold: float, seen: Callable[[], None]
) -> VideoLook:
    """Decode a video and find its changes. Two hours take some 60 MB, most of it for the samples.

    make: a detector for a rate. seen: called after each picture. Raises MediaError.
    """
    info = source_info(path)
    look = VideoLook(info.width, info.height, float(info.rate))
    detector = make(look.rate)
    due = 0.0
    for number, frame in enumerate(shown_frames(path)):
        start = float(frame.start)
        look.starts.append(start)
        look.end = float(frame.start + frame.seconds)
        detector.see(frame.pixels)
        if start >= due:
            look.samples.add(_measure(number, frame.pixels, black_threshold))
            due = start + SAMPLE_SECONDS
        seen()
    look.changes = detector.changes()
    return look


def _measure(number: int, pixels: Pixels, black_threshold: float) -> PictureMeasures:
    frame = in_eight_bits(pixels)
    height, width = frame.shape[:2]
    factor = min(1.0, CELLS / min(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    cells = cv2.cvtColor(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    return PictureMeasures(
        number,
        brightness(frame),
        sharpness(frame),
        is_black(frame, black_threshold),
        is_flat(frame),
        np.asarray(cells, np.uint8),
    )
