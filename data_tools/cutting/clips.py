"""Decode a video once, and choose its clips: scenes, divided into clips of the requested length."""

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import cv2
import numpy as np
from numpy.typing import NDArray

from data_tools.cutting.scenes import SceneChange, SceneDetector
from modules.errors import OptionError
from modules.media.encoding import OutputFrame, Pixels, in_eight_bits
from modules.media.measures import CELLS, brightness, is_black, is_flat, is_static, motion, sharpness
from modules.media.streams import SourceInfo
from modules.options import Options, option

NO_LIMIT = "0 for no limit"

SAMPLE_SECONDS = 0.25  # time between two frames that are measured
SHORT, BLACK, STATIC, BLURRED = "too short", "black", "static", "blurred"  # reasons to omit a clip
ROUNDING_SECONDS = 1e-6  # amount by which a length may exceed its limit: times are sums of rounded numbers
MIN_BLACK_FRACTION = 0.5  # of the measured frames; from this fraction on a clip is left out as black


class LengthOptions(Options, title="lengths"):
    """Minimum and maximum length of clips in seconds and in frames; all limits apply."""

    min_seconds: float = option("shorter clips are left out; 0: none are", default=1.0, minimum=0)
    max_seconds: float = option(
        "longer scenes are cut into equal clips; 0: at any length they stay whole",
        default=10.0,
        minimum=0,
        hint=NO_LIMIT,
    )
    min_frames: int = option("the same, in frames; both limits hold", default=0, minimum=0, hint=NO_LIMIT)
    max_frames: int = option("the same, in frames; both limits hold", default=0, minimum=0, hint=NO_LIMIT)
    trim_frames: int = option(
        "frames to omit at both ends of each scene, of transitions", default=0, minimum=0
    )

    def __post_init__(self) -> None:
        for unit in ("seconds", "frames"):
            minimum, maximum = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if 0 < maximum < minimum:
                raise OptionError(
                    f"--max_{unit} {maximum:g} is less than --min_{unit} {minimum:g}: "
                    "no clip could be that long"
                )


class ChoiceOptions(Options, title="what is left out"):
    """Options that exclude clips by their content."""

    static_threshold: float = option(
        "a clip is static if no part of the image changes its brightness (0 to 1) by that much",
        default=0.012,
        above=0,
        maximum=1,
    )
    black_threshold: float = option(
        "a clip is black if in half of its images nearly all pixels are darker than that (0 to 1)",
        default=0.1,
        above=0,
        maximum=1,
    )
    blur_threshold: float = option(
        "with --drop_blurred: a clip is blurred if most of its images are less sharp than that",
        default=0.002,
        above=0,
        maximum=1,
        ignored_without="drop_blurred",
    )
    keep_static: bool = option("keep static clips, which are otherwise left out")
    keep_black: bool = option("keep black clips, which are otherwise left out")
    drop_blurred: bool = option("omit blurred clips, which are otherwise kept")


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
class VideoAnalysis:
    """Frame times, scene changes and measures of a decoded video; two hours take about 60 MB."""

    width: int
    height: int
    frame_starts: "array[float]" = field(default_factory=lambda: array("d"))  # of each frame, in seconds
    end_seconds: float = 0.0
    measured_frames: list[ImageMeasures] = field(default_factory=list)  # one every SAMPLE_SECONDS
    changes: list[SceneChange] = field(default_factory=list)

    def get_start(self, index: int) -> float:
        """Return when a frame starts in seconds; for the index after the last frame, the end of the video."""
        return self.frame_starts[index] if index < len(self.frame_starts) else self.end_seconds

    def seconds_between(self, first: int, end: int) -> float:
        """Return the duration of the frames from `first` to before `end`."""
        return self.get_start(end) - self.get_start(first)

    def measured_between(self, begin: int, end: int) -> list[ImageMeasures]:
        """Return the measures of sampled frames with `begin` <= index < `end`."""
        first = bisect_left(self.measured_frames, begin, key=lambda measured: measured.number)
        last = bisect_left(self.measured_frames, end, key=lambda measured: measured.number)
        return self.measured_frames[first:last]


def analyze_video(
    info: SourceInfo, frames: Iterable[OutputFrame], detector: SceneDetector, black_threshold: float
) -> VideoAnalysis:
    """Decode a video once: record frame times, find scene changes, measure a frame every SAMPLE_SECONDS."""
    analysis = VideoAnalysis(info.width, info.height)
    next_measured = 0.0  # time in seconds
    for index, frame in enumerate(frames):
        start = float(frame.start)
        analysis.frame_starts.append(start)
        analysis.end_seconds = float(frame.start + frame.seconds)
        detector.add_frame(frame.pixels)
        if start >= next_measured:
            analysis.measured_frames.append(_measure(index, frame.pixels, black_threshold))
            next_measured = start + SAMPLE_SECONDS
    analysis.changes = detector.changes()
    return analysis


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


def plan_clips(analysis: VideoAnalysis, lengths: LengthOptions, choice: ChoiceOptions) -> list[PlannedClip]:
    """Plan the clips of a video in order; clips that are left out have a reason in `dropped`."""
    clips = []
    scenes = list_scenes(analysis.changes, len(analysis.frame_starts))
    for scene_number, (scene_begin, scene_end) in enumerate(scenes, 1):
        # the ends of a scene may show a transition to another scene
        trimmed_begin = scene_begin + lengths.trim_frames
        trimmed_end = scene_end - lengths.trim_frames
        if trimmed_begin >= trimmed_end:
            clips.append(_make_clip(analysis, scene_number, scene_begin, scene_end, dropped=SHORT))
            continue
        for first, end in _split_scene(analysis, trimmed_begin, trimmed_end, lengths):
            reason = SHORT
            if _is_long_enough(analysis, first, end, lengths):
                reason = _find_reason_to_drop(analysis, first, end, choice)
            clips.append(_make_clip(analysis, scene_number, first, end, dropped=reason))
    return clips


def list_scenes(changes: Sequence[SceneChange], frames: int) -> list[tuple[int, int]]:
    """Return (first, end) of each scene between changes; frames of a transition belong to no scene."""
    begins = [0, *(end for _, end in changes)]
    ends = [*(begin for begin, _ in changes), frames]
    return [(begin, end) for begin, end in zip(begins, ends, strict=True) if begin < end]


def _split_scene(
    analysis: VideoAnalysis, first: int, end: int, lengths: LengthOptions
) -> Iterator[tuple[int, int]]:
    """Yield (first frame, frame after the last) of each clip in a scene."""
    # The clips are equally long, or, if these would be too short, as long as allowed with a shorter last one.
    equal_clips = _split_equally(analysis, first, end, lengths)
    are_long_enough = all(_is_long_enough(analysis, begin, stop, lengths) for begin, stop in equal_clips)
    if len(equal_clips) == 1 or (equal_clips and are_long_enough):
        yield from equal_clips
        return
    while first < end:
        clip_end = min(end, first + lengths.max_frames) if lengths.max_frames else end
        if not _is_short_enough(analysis, first, clip_end, lengths):
            # the last frame that starts within the limit; a clip has at least one frame
            limit = analysis.get_start(first) + lengths.max_seconds + ROUNDING_SECONDS
            clip_end = max(bisect_right(analysis.frame_starts, limit, first, clip_end) - 1, first + 1)
        yield first, clip_end
        first = clip_end


def _split_equally(
    analysis: VideoAnalysis, first: int, end: int, lengths: LengthOptions
) -> list[tuple[int, int]]:
    """Divide a scene into as few clips of equal duration as possible; [] if no division meets the limits."""
    num_frames = end - first
    min_clips = 1
    if lengths.max_seconds:
        seconds = analysis.seconds_between(first, end)
        min_clips = max(min_clips, math.ceil(seconds / lengths.max_seconds - ROUNDING_SECONDS))
    if lengths.max_frames:
        min_clips = max(min_clips, math.ceil(num_frames / lengths.max_frames))
    # a clip of whole frames may be slightly longer than its share of the time: then more clips are tried
    for num_clips in range(min_clips, num_frames + 1):
        # The clips are equal in time, not in frames, because the frame rate may vary. There are fewer if
        # frames are long.
        seconds = analysis.seconds_between(first, end)
        cut_frames = []
        for index in range(1, num_clips):
            cut_time = analysis.get_start(first) + seconds * index / num_clips - ROUNDING_SECONDS
            cut_frames.append(bisect_left(analysis.frame_starts, cut_time, first, end))
        distinct_frames = [frame for frame in dict.fromkeys(cut_frames) if first < frame < end]
        borders = [first, *distinct_frames, end]
        clips = list(zip(borders, borders[1:], strict=False))
        if all(_is_short_enough(analysis, begin, stop, lengths) for begin, stop in clips):
            return clips
    return []


def _is_short_enough(analysis: VideoAnalysis, first: int, end: int, lengths: LengthOptions) -> bool:
    """Return whether frames from `first` to `end` exceed neither maximum length."""
    num_frames = end - first
    if num_frames == 1:  # a single frame cannot be split further
        return True
    seconds = analysis.seconds_between(first, end)
    is_short = not lengths.max_seconds or seconds <= lengths.max_seconds + ROUNDING_SECONDS
    has_few_frames = not lengths.max_frames or num_frames <= lengths.max_frames
    return is_short and has_few_frames


def _is_long_enough(analysis: VideoAnalysis, first: int, end: int, lengths: LengthOptions) -> bool:
    """Return whether frames from `first` to `end` reach both minimum lengths."""
    seconds = analysis.seconds_between(first, end)
    return end - first >= lengths.min_frames and seconds >= lengths.min_seconds - ROUNDING_SECONDS


def _find_reason_to_drop(analysis: VideoAnalysis, first: int, end: int, choice: ChoiceOptions) -> str:
    """Return why the content of a clip excludes it from the output; "" if it does not."""
    measured_frames = analysis.measured_between(first, end)
    if not measured_frames:
        return ""
    num_black = sum(measured.is_black for measured in measured_frames)
    if num_black >= MIN_BLACK_FRACTION * len(measured_frames):
        # black frames also look static and blurred: with --keep_black the clip stays
        return "" if choice.keep_black else BLACK
    frames = [measured.cells for measured in measured_frames]
    if not choice.keep_static and len(frames) > 1 and is_static(frames, choice.static_threshold):
        return STATIC
    if choice.drop_blurred:
        details = [measured for measured in measured_frames if not measured.is_flat]
        num_blurred = sum(measured.sharpness < choice.blur_threshold for measured in details)
        if 2 * num_blurred > len(measured_frames):
            return BLURRED
    return ""


def _make_clip(analysis: VideoAnalysis, scene: int, first: int, end: int, dropped: str) -> PlannedClip:
    """Return a clip with its measures; `dropped` is the reason why it is not written."""
    measured_frames = analysis.measured_between(first, end)
    return PlannedClip(
        scene,
        first,
        end,
        start=analysis.get_start(first),
        seconds=analysis.seconds_between(first, end),
        brightness=fmean(measured.brightness for measured in measured_frames) if measured_frames else 0.0,
        motion=motion([measured.cells for measured in measured_frames]),
        sharpness=fmean(measured.sharpness for measured in measured_frames) if measured_frames else 0.0,
        dropped=dropped,
    )
