"""Read all pictures of a video once, and choose its clips: scenes, in pieces of the wanted length."""

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import cv2
import numpy as np
from numpy.typing import NDArray

from data_tools.cutting.options import ChoiceOptions, LengthOptions
from data_tools.cutting.scenes import SceneChange, SceneDetector
from modules.media.encoding import OutputFrame, Pixels, in_eight_bits
from modules.media.measures import CELLS, brightness, is_black, is_flat, is_static, motion, sharpness
from modules.media.streams import SourceInfo

SAMPLE_SECONDS = 0.25  # between two frames that are measured
SHORT, BLACK, STATIC, BLURRED = "too short", "black", "static", "blurred"  # reasons to leave out a clip
ROUNDING = 1e-6  # seconds by which a length may pass its limit: times are sums of rounded numbers
BLACK_PART = 0.5  # part of the frames that are black in a clip that is left out


@dataclass(frozen=True, slots=True)
class ImageMeasures:
    """Brightness, sharpness and uniformity of one video frame."""

    number: int
    brightness: float
    sharpness: float
    is_black: bool
    is_flat: bool
    cells: NDArray[np.uint8]  # h w 3, three times the luma: a frame reduced to 32 pixels on its shorter side


@dataclass
class VideoLook:
    """Times, scenes and samples of a video that was decoded completely; two hours take about 60 MB."""

    width: int
    height: int
    starts: "array[float]" = field(default_factory=lambda: array("d"))  # start of each frame, in seconds
    end: float = 0.0
    samples: list[ImageMeasures] = field(default_factory=list)
    changes: list[SceneChange] = field(default_factory=list)

    def time(self, number: int) -> float:
        """Return when a frame starts in seconds; for the index after the last frame, the end of the video."""
        return self.starts[number] if number < len(self.starts) else self.end

    def samples_between(self, begin: int, end: int) -> list[ImageMeasures]:
        """Return the measures of sampled frames with `begin` <= number < `end`."""
        first = bisect_left(self.samples, begin, key=lambda sample: sample.number)
        last = bisect_left(self.samples, end, key=lambda sample: sample.number)
        return self.samples[first:last]


def look_at(
    info: SourceInfo, frames: Iterable[OutputFrame], detector: SceneDetector, black_threshold: float
) -> VideoLook:
    """Decode a video once, to find its frame times, scene changes and measures."""
    look = VideoLook(info.width, info.height)
    due = 0.0  # time of the next frame to measure
    for number, frame in enumerate(frames):
        start = float(frame.start)
        look.starts.append(start)
        look.end = float(frame.start + frame.seconds)
        detector.see(frame.pixels)
        if start >= due:  # measured every SAMPLE_SECONDS only
            look.samples.append(_measure(number, frame.pixels, black_threshold))
            due = start + SAMPLE_SECONDS
    look.changes = detector.changes()
    return look


def _measure(number: int, pixels: Pixels, black_threshold: float) -> ImageMeasures:
    """Measure brightness, sharpness and uniformity of a frame; `number` is its index in the video."""
    frame = in_eight_bits(pixels)
    height, width = frame.shape[:2]
    factor = min(1.0, CELLS / min(height, width))  # the shorter side is reduced to CELLS
    size = max(1, round(width * factor)), max(1, round(height * factor))
    small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    cells = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    return ImageMeasures(
        number,
        brightness=brightness(frame),
        sharpness=float(np.float32(sharpness(frame))),  # the thresholds were chosen in this precision
        is_black=is_black(frame, black_threshold),
        is_flat=is_flat(frame),
        # motion is measured between color images: three channels that share the gray values
        cells=np.broadcast_to(cells[..., None], (*cells.shape, 3)),
    )


@dataclass(frozen=True)
class PlannedClip:
    """Frames `first` to `end` (exclusive) of a video, planned as a clip or left out for a reason."""

    scene: int  # from 1
    first: int
    end: int
    start: float  # seconds
    seconds: float
    brightness: float  # mean of some frames, 0..1
    motion: float  # mean of some frames, 0..1
    sharpness: float  # mean of some frames, as `measures.sharpness` returns it
    dropped: str = ""  # why it is left out

    @property
    def frames(self) -> int:
        """Number of frames in the clip."""
        return self.end - self.first


def plan_clips(look: VideoLook, lengths: LengthOptions, choice: ChoiceOptions) -> list[PlannedClip]:
    """Plan the clips of a video in order; clips that are left out have a reason in `dropped`."""
    clips = []
    for scene, (begin, end) in enumerate(scenes_of(look.changes, len(look.starts)), 1):
        # the ends of a scene may show a transition to another scene
        trimmed_begin = begin + lengths.trim_frames
        trimmed_end = end - lengths.trim_frames
        if trimmed_begin >= trimmed_end:
            clips.append(_make_clip(look, scene, begin, end, dropped=SHORT))
            continue
        for first, last in _split_scene(look, trimmed_begin, trimmed_end, lengths):
            if _is_long_enough(look, first, last, lengths):
                reason = _find_content_reason(look, first, last, choice)
            else:
                reason = SHORT
            clips.append(_make_clip(look, scene, first, last, dropped=reason))
    return clips


def scenes_of(changes: Sequence[SceneChange], frames: int) -> list[tuple[int, int]]:
    """Return (first, end) of each scene between changes; frames of a transition belong to no scene."""
    begins = [0, *(end for _, end in changes)]
    ends = [*(begin for begin, _ in changes), frames]
    return [(begin, end) for begin, end in zip(begins, ends, strict=True) if begin < end]


def _split_scene(look: VideoLook, first: int, end: int, lengths: LengthOptions) -> Iterator[tuple[int, int]]:
    """Yield the first frame of each clip in a scene, and the frame after its last one.

    The clips are equally long, or, if these would be too short, as long as allowed with a shorter last one.
    """
    pieces = _split_equally(look, first, end, lengths)
    are_long_enough = all(_is_long_enough(look, begin, stop, lengths) for begin, stop in pieces)
    if len(pieces) == 1 or (pieces and are_long_enough):
        yield from pieces
        return
    while first < end:
        last = min(end, first + lengths.max_frames) if lengths.max_frames else end
        if not _is_short_enough(look, first, last, lengths):
            # the last frame that starts within the limit; a clip has at least one frame
            limit = look.time(first) + lengths.max_seconds + ROUNDING
            last = max(bisect_right(look.starts, limit, first, last) - 1, first + 1)
        yield first, last
        first = last


def _split_equally(look: VideoLook, first: int, end: int, lengths: LengthOptions) -> list[tuple[int, int]]:
    """Divide a scene into as few clips of equal duration as possible; [] if no division meets the limits."""
    seconds = look.time(end) - look.time(first)
    num_frames = end - first
    minimum = 1
    if lengths.max_seconds:
        minimum = max(minimum, math.ceil(seconds / lengths.max_seconds - ROUNDING))
    if lengths.max_frames:
        minimum = max(minimum, math.ceil(num_frames / lengths.max_frames))
    # a piece between whole frames may be slightly longer than its part: then more pieces are tried
    for count in range(minimum, num_frames + 1):
        # equal in time, not in frames, because the rate may vary
        times = [look.time(first) + seconds * index / count - ROUNDING for index in range(1, count)]
        # without duplicates: short times may fall on one frame
        cut_frames = dict.fromkeys(bisect_left(look.starts, time, first, end) for time in times)
        borders = [first, *(border for border in cut_frames if first < border < end), end]
        pieces = list(zip(borders, borders[1:], strict=False))
        if all(_is_short_enough(look, begin, stop, lengths) for begin, stop in pieces):
            return pieces
    return []


def _is_short_enough(look: VideoLook, first: int, end: int, lengths: LengthOptions) -> bool:
    """Return whether frames from `first` to `end` exceed neither maximum length."""
    num_frames = end - first
    if num_frames == 1:  # a single frame cannot be split further
        return True
    seconds = look.time(end) - look.time(first)
    is_short = not lengths.max_seconds or seconds <= lengths.max_seconds + ROUNDING
    has_few_frames = not lengths.max_frames or num_frames <= lengths.max_frames
    return is_short and has_few_frames


def _is_long_enough(look: VideoLook, first: int, end: int, lengths: LengthOptions) -> bool:
    """Return whether frames from `first` to `end` reach both minimum lengths."""
    seconds = look.time(end) - look.time(first)
    return end - first >= lengths.min_frames and seconds >= lengths.min_seconds - ROUNDING


def _find_content_reason(look: VideoLook, first: int, end: int, choice: ChoiceOptions) -> str:
    """Return why the content of a clip excludes it from the output; "" if it does not."""
    samples = look.samples_between(first, end)
    if not samples:
        return ""
    num_black = sum(sample.is_black for sample in samples)
    if num_black >= BLACK_PART * len(samples):
        return "" if choice.keep_black else BLACK
    frames = [sample.cells for sample in samples]
    if not choice.keep_static and len(frames) > 1 and is_static(frames, choice.static_threshold):
        return STATIC
    num_blurred = sum(not sample.is_flat and sample.sharpness < choice.blur_threshold for sample in samples)
    return BLURRED if choice.drop_blurred and 2 * num_blurred > len(samples) else ""


def _make_clip(look: VideoLook, scene: int, first: int, end: int, dropped: str) -> PlannedClip:
    """Return a clip with its measures; `dropped` is the reason why it is not written."""
    samples = look.samples_between(first, end)
    return PlannedClip(
        scene,
        first,
        end,
        start=look.time(first),
        seconds=look.time(end) - look.time(first),
        brightness=fmean(sample.brightness for sample in samples) if samples else 0.0,
        motion=motion([sample.cells for sample in samples]),
        sharpness=fmean(sample.sharpness for sample in samples) if samples else 0.0,
        dropped=dropped,
    )
