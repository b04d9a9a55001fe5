"""Read each source of a table once and keep its numbers: sizes, items, measures and hashes."""
# Letters: H, W height and width of a frame

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from dataset.caching.prefetch import decode_ahead, read_ahead
from dataset.caching.reports import Failure
from dataset.checking.looks import EvenFrames, MediaLook, choose_evenly, read_source
from dataset.sources.decoding import decode_source, fit_of, plan_source, spans_or_reason
from dataset.sources.fetching import fetch
from dataset.sources.media_source import MediaSource
from dataset.sources.steps import Steps
from modules.bars import Bar
from modules.errors import DatasetError, MediaError
from modules.media.buckets import Fit, fit_cover
from modules.media.measures import (
    BLURRED,
    SHARP_SIDE,
    brightness,
    clip_hash,
    hashed_frames,
    is_black,
    is_flat,
    is_static,
    motion,
    sharpness,
)
from modules.media.reading import Frame, video_info

MOST_MEASURED = 12  # frames of a clip
COLOUR_SIDE = 4  # of the small pictures that tell copies from pictures of one shape and other colours
DIGITS = 4  # of measures


@dataclass(frozen=True, slots=True)
class Measures:
    """Measures of the used frames of a source. Of a clip, the mean over some frames."""

    brightness: float  # 0..1
    motion: float  # 0..1; 0 of a picture
    sharpness: float  # the median over the frames
    is_black: bool  # all frames are
    is_static: bool  # a clip in which nothing moves, and which is not black
    is_blurred: bool  # most frames are
    is_flat: bool  # all frames have one colour, so that their hash says nothing
    hashes: tuple[int, ...]  # one of a picture, four of a clip
    colours: bytes  # the same frames as 4 x 4 RGB, one after the other


@dataclass(frozen=True, slots=True)
class Measured:
    """The numbers of a source; small, because there may be a million."""

    place: int  # among the sources of its table
    fit: Fit | None = None
    size: tuple[int, int] | None = None  # width, height
    fps: float | None = None  # of the file
    seconds: float | None = None  # of the file
    used: int = 0  # frames that are used
    lengths: tuple[tuple[int, int], ...] = ()  # frames of an item, how many such items
    problem: str | None = None  # why it cannot be read
    none: str | None = None  # why it gives no item although it can be read
    short: str | None = None  # for which target_frames it is too short
    measures: Measures | None = None

    @property
    def items(self) -> int:
        return sum(count for _, count in self.lengths)

    @property
    def cut_percent(self) -> float:
        """Return how much of the picture's area is cut off."""
        return MediaLook(fit=self.fit).cut_percent


def measure_all(
    sources: Sequence[MediaSource], fps: float, steps: Steps, decodes: bool, workers: int
) -> Generator[Measured, None, None]:
    """Yield the numbers of the sources in order, while threads work on later ones.

    fps: the model's rate. decodes: False reads headers only, and measures nothing.
    """
    jobs = list(enumerate(sources))
    bar = Bar(len(jobs), "Measuring" if decodes else "Reading headers", "file")

    def work(job: tuple[int, MediaSource]) -> Measured:
        if decodes or job[1].tensors is not None:  # whose header is all that is read
            return measure_source(*job, fps, steps)
        return read_header(*job, fps, steps)

    ahead = decode_ahead if decodes else read_ahead
    for job, result in ahead(jobs, lambda job: job[1], work, workers, bar):
        yield Measured(job[0], problem=str(result)) if isinstance(result, Failure) else result


def measure_source(place: int, source: MediaSource, fps: float, steps: Steps) -> Measured:
    """Decode a source as caching does, and measure the frames that are used."""
    sample = EvenFrames(_Reduce())
    look = read_source(source, fps, steps, sample.add)
    problem = look.problem or _problem_beside(source, fps, steps)
    frames = choose_evenly(sample.frames, MOST_MEASURED) if sample.frames else []
    lengths = tuple(sorted(Counter(length for _, length in look.spans).items())) if problem is None else ()
    fit = fit_cover(look.size, look.size) if look.fit is None and look.size is not None else look.fit
    return Measured(
        place,
        fit,  # of given latents, nothing is cut off
        look.size,
        look.fps,
        _seconds(look.frames, look.fps),
        look.used,
        lengths,
        problem,
        None if look.spans or problem is not None else _reason(source, look.used, steps),
        look.short,
        None if problem is not None or not frames else measure_frames(frames, source.table.kind == "video"),
    )


def read_header(place: int, source: MediaSource, fps: float, steps: Steps) -> Measured:
    """Return the facts in the header of a source; a clip whose header has no number of frames is decoded."""
    try:
        with fetch(source) as here:
            plan = plan_source(here, fps, steps.pixel_step, steps.frame_step)
            info = video_info(here.path) if source.table.kind == "video" else None
    except (MediaError, DatasetError, OSError) as error:
        return Measured(place, problem=str(error))
    lengths = tuple(sorted(Counter(length for _, length in plan.spans).items()))
    return Measured(
        place,
        fit_of(source.table, plan.size, steps.pixel_step, source.path),
        plan.size,
        info.fps if info else None,
        _seconds(info.frames, info.fps) if info else None,
        lengths=lengths,
        none=plan.reason,
    )


def measure_frames(frames: Sequence[Frame], is_clip: bool) -> Measures:
    """Return the measures of a picture, or of frames of a clip, all of one size."""
    black = all(map(is_black, frames))
    flat, sharp = [is_flat(frame) for frame in frames], [sharpness(frame) for frame in frames]
    blurred = sum(not one and value < BLURRED for one, value in zip(flat, sharp, strict=True))
    return Measures(
        _round(np.mean([brightness(frame) for frame in frames])),
        _round(motion(frames)),
        _round(np.median(sharp)),
        black,
        is_clip and len(frames) > 1 and not black and is_static(frames),
        2 * blurred > len(frames),
        all(flat),
        clip_hash(frames),
        b"".join(_colours(frame) for frame in hashed_frames(frames)),
    )


class _Reduce:
    """Reduce the frames of a source for measuring, all to the size of the first one."""

    def __init__(self) -> None:
        self._size: tuple[int, int] | None = None

    def __call__(self, frame: Frame) -> Frame:
        if self._size is None:
            height, width = frame.shape[:2]
            factor = min(1.0, SHARP_SIDE / max(height, width))
            self._size = (max(1, round(width * factor)), max(1, round(height * factor)))
        if (frame.shape[1], frame.shape[0]) == self._size:
            return frame
        return np.asarray(cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA), np.uint8)


def _problem_beside(source: MediaSource, fps: float, steps: Steps) -> str | None:
    """Return why the control media or the mask of a source cannot be read: caching would refuse it."""
    if not source.control and source.mask_from is None:
        return None
    try:
        decode_source(source, fps, steps.pixel_step, steps.frame_step)
    except (MediaError, DatasetError, OSError) as error:
        return str(error)
    return None


def _colours(frame: Frame) -> bytes:
    small = cv2.resize(frame, (COLOUR_SIDE, COLOUR_SIDE), interpolation=cv2.INTER_AREA)
    return bytes(np.asarray(small, np.uint8).tobytes())


def _reason(source: MediaSource, used: int, steps: Steps) -> str | None:
    """Return why a clip with so many usable frames gives no item."""
    return spans_or_reason(source.table, used, steps.frame_step)[1]


def _seconds(frames: int | None, fps: float | None) -> float | None:
    return frames / fps if frames and fps else None


def _round(value: object) -> float:
    return round(float(value), DIGITS)  # type: ignore[arg-type]
