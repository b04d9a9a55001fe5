"""Look at all pictures of a video once: its scenes, its times, and what is measured of it."""

from array import array
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dataset.cutting.changes import Change, Detector
from modules.media.depth import Pixels, in_eight_bits
from modules.media.measures import CELLS, brightness, is_black, is_flat, sharpness
from modules.media.streams import shown_frames, source_info

SAMPLE_SECONDS = 0.25  # between two pictures that are measured


@dataclass(frozen=True)
class Sample:
    """What is measured of one picture."""

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


@dataclass
class Look:
    """What is known of a video after all of it was looked at."""

    width: int
    height: int
    rate: float  # pictures a second on average
    starts: "array[float]" = field(default_factory=lambda: array("d"))  # of each picture, in seconds
    end: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)

    def time(self, number: int) -> float:
        """Return when a frame begins; for the number behind the last one, when the last ends."""
        return self.starts[number] if number < len(self.starts) else self.end

    def samples_of(self, begin: int, end: int) -> list[Sample]:
        """Return the samples of the frames from `begin` to before `end`."""
        first, last = (
            bisect_left(self.samples, one, key=lambda sample: sample.number) for one in (begin, end)
        )
        return self.samples[first:last]


def look_at(
    path: Path, make: Callable[[float], Detector], black_threshold: float, seen: Callable[[], None]
) -> Look:
    """Decode a video and find its changes. Two hours take about 60 MB, most of it for the samples.

    make: a detector for a rate. seen: called after each picture. Raises MediaError.
    """
    info = source_info(path)
    look = Look(info.width, info.height, float(info.rate))
    detector = make(look.rate)
    due = 0.0
    for number, frame in enumerate(shown_frames(path)):
        start = float(frame.start)
        look.starts.append(start)
        look.end = float(frame.start + frame.seconds)
        detector.see(frame.pixels)
        if start >= due:
            look.samples.append(_measure(number, frame.pixels, black_threshold))
            due = start + SAMPLE_SECONDS
        seen()
    look.changes = detector.changes()
    return look


def _measure(number: int, pixels: Pixels, black_threshold: float) -> Sample:
    frame = in_eight_bits(pixels)
    height, width = frame.shape[:2]
    factor = min(1.0, CELLS / min(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    cells = cv2.cvtColor(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    return Sample(
        number,
        brightness(frame),
        sharpness(frame),
        is_black(frame, black_threshold),
        is_flat(frame),
        np.asarray(cells, np.uint8),
    )
