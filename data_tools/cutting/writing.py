"""Write the clips of a video: all in one pass over its pictures, each under its name once it is complete."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from data_tools.cutting.options import ClipFormat
from data_tools.cutting.planning import PlannedClip
from modules.errors import MediaError
from modules.media.encoding import settle_codec
from modules.media.sections import VideoSection
from modules.media.streams import ShownFrame, shown_frames, source_info
from modules.media.writing import write_shown

MICRO = 1_000_000


def write_clips(
    source: Path, clips: Sequence[tuple[Path, PlannedClip]], form: ClipFormat, seen: Callable[[], None]
) -> int:
    """Write clips that are not there yet, in the order of their frames; returns how many.

    The frames are those of the source, at its times: also of a variable rate. seen: called after each frame
    that was read. Raises MediaError, OutputError.
    """
    missing = [(path, clip) for path, clip in clips if not os.path.lexists(path)]
    if not missing:
        return 0
    info = source_info(source)
    codec = settle_codec(form.codec, info.width, info.height)
    frames = _counted(source, form.is_deep, seen)
    for path, clip in missing:
        write_shown(
            *(path, _frames_of(frames, source, clip), info.rate, codec),
            crf=form.crf,
            preset=form.preset,
            section_of=VideoSection(source, _exact(clip.start), _exact(clip.seconds), not form.no_audio),
        )
    return len(missing)


def _counted(source: Path, deep: bool, seen: Callable[[], None]) -> Iterator[tuple[int, ShownFrame]]:
    for number, frame in enumerate(shown_frames(source, deep)):
        seen()
        yield number, frame


def _frames_of(
    frames: Iterator[tuple[int, ShownFrame]], source: Path, clip: PlannedClip
) -> Iterator[ShownFrame]:
    """Yield the frames of a clip, from 0 s on. Frames before it are passed over, none behind it is taken."""
    origin: Fraction | None = None
    for number, frame in frames:
        if number < clip.first:
            continue
        origin = frame.start if origin is None else origin
        yield replace(frame, start=frame.start - origin)
        if number == clip.end - 1:
            return
    raise MediaError(f"{source} has changed while it was cut: it has fewer frames than before. Run again.")


def _exact(seconds: float) -> Fraction:
    return Fraction(round(seconds * MICRO), MICRO)
