"""Choose the clips of a video: its scenes, in pieces of the wanted length, without empty parts."""

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from data_tools.cutting.changes import SceneChange
from data_tools.cutting.looking import PictureMeasures, VideoLook
from data_tools.cutting.options import ChoiceOptions, LengthOptions
from modules.media.measures import is_static, motion

SHORT, BLACK, STATIC, BLURRED = "too short", "black", "static", "blurred"  # why a clip is left out
ROUNDING = 1e-6  # seconds: times are sums of fractions
BLACK_PART = 0.5  # of the pictures of a clip


@dataclass(frozen=True)
class PlannedClip:
    """Frames from `first` to before `end` of a video, which become a clip or are left out."""

    scene: int  # from 1
    first: int
    end: int
    start: float  # seconds
    seconds: float
    brightness: float  # these three: means of some pictures; 0..1, and of `measures.sharpness`
    motion: float
    sharpness: float
    dropped: str = ""  # why it is left out

    @property
    def frames(self) -> int:
        """How many frames it has."""
        return self.end - self.first


def plan_clips(look: VideoLook, lengths: LengthOptions, choice: ChoiceOptions) -> list[PlannedClip]:
    """Return all clips of a video in order, those that are left out too."""
    clips = []
    for number, (begin, end) in enumerate(scenes_of(look.changes, len(look.starts)), 1):
        first, last = begin + lengths.trim_frames, end - lengths.trim_frames
        if first >= last:
            clips.append(_measured(look, number, begin, end, SHORT))
            continue
        for piece in _pieces(look, first, last, lengths):
            reason = "" if _is_long_enough(look, *piece, lengths) else SHORT
            clips.append(_measured(look, number, *piece, reason or _look_reason(look, *piece, choice)))
    return clips


def scenes_of(changes: Sequence[SceneChange], frames: int) -> list[tuple[int, int]]:
    """Return the scenes between changes: the first frame of each, and the one behind its last."""
    begins = [0, *(change.end for change in changes)]
    ends = [*(change.begin for change in changes), frames]
    return [(begin, end) for begin, end in zip(begins, ends, strict=True) if begin < end]


def count_reasons(clips: Sequence[PlannedClip]) -> Counter[str]:
    """Return how many clips are left out, by the reason."""
    return Counter(clip.dropped for clip in clips if clip.dropped)


def _pieces(look: VideoLook, first: int, end: int, lengths: LengthOptions) -> Iterator[tuple[int, int]]:
    """Yield a scene in as few equal pieces as the longest length allows.

    If those would be too short, in pieces of the longest length, and the rest.
    """
    seconds, frames = look.time(end) - look.time(first), end - first
    least = max(
        math.ceil(seconds / lengths.max_seconds - ROUNDING) if lengths.max_seconds else 1,
        math.ceil(frames / lengths.max_frames) if lengths.max_frames else 1,
        1,
    )
    for count in range(least, frames + 1):
        borders = _even_borders(look, first, end, count)
        pieces = list(zip(borders, borders[1:], strict=False))
        if all(_is_short_enough(look, *piece, lengths) for piece in pieces):
            if all(_is_long_enough(look, *piece, lengths) for piece in pieces) or count == 1:
                yield from pieces
                return
            break
    while first < end:
        last = _farthest(look, first, end, lengths)
        yield first, last
        first = last


def _even_borders(look: VideoLook, first: int, end: int, count: int) -> list[int]:
    """Return the first frames of equal pieces, and the end: equal in time, so that any rate will do."""
    start, stop = look.time(first), look.time(end)
    inner = [
        bisect_left(look.starts, start + (stop - start) * place / count - ROUNDING, first, end)
        for place in range(1, count)
    ]
    return [first, *(border for border in dict.fromkeys(inner) if first < border < end), end]


def _farthest(look: VideoLook, first: int, end: int, lengths: LengthOptions) -> int:
    """Return the end of the longest piece from `first` on; one frame at least."""
    last = min(end, first + lengths.max_frames) if lengths.max_frames else end
    if not _is_short_enough(look, first, last, lengths):
        limit = look.time(first) + lengths.max_seconds + ROUNDING
        last = bisect_right(look.starts, limit, first, last) - 1
    return max(last, first + 1)


def _is_short_enough(look: VideoLook, first: int, end: int, lengths: LengthOptions) -> bool:
    seconds = look.time(end) - look.time(first)
    is_short = not lengths.max_seconds or seconds <= lengths.max_seconds + ROUNDING
    # a single frame cannot be cut
    return end - first == 1 or (is_short and (not lengths.max_frames or end - first <= lengths.max_frames))


def _is_long_enough(look: VideoLook, first: int, end: int, lengths: LengthOptions) -> bool:
    seconds = look.time(end) - look.time(first)
    return end - first >= lengths.min_frames and seconds >= lengths.min_seconds - ROUNDING


def _look_reason(look: VideoLook, first: int, end: int, choice: ChoiceOptions) -> str:
    """Return why a clip is left out for its content; empty if it is kept."""
    samples = look.samples.between(first, end)
    if not samples:
        return ""
    if sum(one.is_black for one in samples) >= BLACK_PART * len(samples):
        return "" if choice.keep_black else BLACK
    frames = [one.reduced for one in samples]
    if not choice.keep_static and len(frames) > 1 and is_static(frames, choice.static_threshold):
        return STATIC
    if choice.drop_blurred and 2 * sum(_is_blurred(one, choice) for one in samples) > len(samples):
        return BLURRED
    return ""


def _is_blurred(sample: PictureMeasures, choice: ChoiceOptions) -> bool:
    return not sample.is_flat and sample.sharpness < choice.blur_threshold


def _measured(look: VideoLook, scene: int, first: int, end: int, dropped: str) -> PlannedClip:
    samples = look.samples.between(first, end)
    return PlannedClip(
        *(scene, first, end, look.time(first), look.time(end) - look.time(first)),
        brightness=fmean(one.brightness for one in samples) if samples else 0.0,
        motion=motion([one.reduced for one in samples]),
        sharpness=fmean(one.sharpness for one in samples) if samples else 0.0,
        dropped=dropped,
    )
