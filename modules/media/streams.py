"""Read a video as a stream of images with exact times, for results that keep its timing.

Times are fractions of a second from the moment at which the file begins to play. Containers round them, for
example Matroska to milliseconds: a rounded time of a constant rate is given back exactly.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from logging import getLogger
from pathlib import Path
from typing import Any

from modules.errors import MediaError
from modules.media import decoding
from modules.media.colors import HDR, blend_on_white
from modules.media.encoding import OutputFrame, in_eight_bits
from modules.media.opening import open_video
from modules.media.reading import image_size

logger = getLogger(__name__)

DEFAULT_RATE = Fraction(25)  # for files without a rate, as in FFmpeg
RATE_TOLERANCE = Fraction(1, 10_000)  # a tenth of the difference between 24 and 24000/1001
START_TOLERANCE = Fraction(1, 1000)  # seconds; resolution of start times in MP4
FALL_SECONDS = 1  # a larger drop of times means that two recordings were joined


@dataclass(frozen=True)
class SourceInfo:
    """Facts about a video from its header; sizes are those of upright images."""

    width: int
    height: int
    rate: Fraction  # images a second on average
    frames: int | None  # from the header, or from duration and rate; only for progress
    is_deep: bool  # more than 8 bits per channel


def source_info(path: Path) -> SourceInfo:
    """Read the header and the first frame of a video file.

    Raises:
        MediaError: If the file is missing, empty, not a video, without a video stream, without any frame, or
            shorter than its header says.
    """
    if decoding.is_animation(path):
        durations = decoding.animation_durations(path)
        rate = len(durations) / sum(map(_round_animation_seconds, durations), Fraction(0))
        return SourceInfo(*image_size(path), rate, len(durations), is_deep=False)
    with open_video(path) as (container, stream):
        decoding.check_size(path, container, stream)
        first, width, height = decoding.first_image(path, container, stream)
        rate = _find_rate(stream)
        frames = _count_frames(path, container, stream, rate)
        return SourceInfo(width, height, rate, frames, is_deep=_is_deep(first))


def _count_frames(path: Path, container: Any, stream: Any, rate: Fraction) -> int | None:
    """Return the frame count from the header, else from the duration; None if neither is plausible."""
    maximum = path.stat().st_size  # headers may be wrong, but each frame takes at least a byte
    count = int(stream.frames)
    if 0 < count <= maximum:
        return count
    seconds = Fraction(0)
    if stream.duration:
        seconds = Fraction(stream.duration * stream.time_base)
    elif container.duration:
        seconds = Fraction(container.duration, 1_000_000)
    count = round(seconds * rate)
    return count if 0 < count <= maximum else None


def shown_frames(path: Path, deep: bool = False, limit: int | None = None) -> Iterator[OutputFrame]:
    """Yield the frames of a video file in playing order, upright, with strictly increasing times.

    With `deep`, frames have 16 bits per channel if the file has more than 8. At most `limit` frames are read.

    Raises:
        MediaError: If the file is not a readable video, is damaged or truncated, or if its frames change
        size.
    """
    if limit is not None and limit < 1:
        return
    previous: OutputFrame | None = None
    frames = _read_animation(path) if decoding.is_animation(path) else _read_timed(path, deep)
    for index, frame in enumerate(frames):
        if previous is not None:
            # a frame is shown until the next one starts
            yield OutputFrame(previous.pixels, previous.start, frame.start - previous.start)
        if index == limit:  # this frame was read only for the duration of the previous one
            return
        if previous is not None and frame.pixels.shape != previous.pixels.shape:
            sizes = " to ".join(
                f"{shown.pixels.shape[1]} x {shown.pixels.shape[0]}" for shown in (previous, frame)
            )
            raise MediaError(
                f"{path} changes its size from {sizes} at {float(frame.start):.2f} s. Cut it there, or bring "
                "it to one size first."
            )
        previous = frame
    if previous is not None:
        yield previous


def _read_animation(path: Path) -> Iterator[OutputFrame]:
    start = Fraction(0)
    for pixels, duration in decoding.animation_frames(path):
        seconds = _round_animation_seconds(duration)
        yield OutputFrame(blend_on_white(pixels), start, seconds)
        start += seconds


def _round_animation_seconds(duration: float) -> Fraction:
    return Fraction(duration).limit_denominator(1000)  # GIF stores hundredths of a second, WebP thousandths


def _read_timed(path: Path, deep: bool) -> Iterator[OutputFrame]:
    """Yield the frames of a video, each with its corrected start time and its duration in seconds."""
    with open_video(path) as (container, stream):
        rate = _find_rate(stream)
        origin = decoding.time_origin(container)
        clock = Clock(rate, Fraction(stream.time_base))
        end = _find_end(container, stream)
        if end is not None:
            end -= origin
        for index, timed in enumerate(decoding.decode_frames(path, container, stream)):
            frame = timed.frame
            time_base = frame.time_base or stream.time_base
            if index == 0:
                _warn_of_hdr(path, frame)
                if container.format.name == "avi":  # AVI has no times, and FFmpeg guesses a decoder delay
                    origin = (frame.pts or 0) * time_base
            start = clock.correct_start(None if frame.pts is None else frame.pts * time_base - origin)
            pixels = decoding.frame_pixels(timed.frame, stream, _is_deep(timed.frame))
            if not deep:
                pixels = in_eight_bits(pixels)
            pixels = decoding.turn_upright(pixels, timed.orientation)
            stated_seconds = Fraction(frame.duration * time_base) if frame.duration else None
            seconds = clock.correct_duration(stated_seconds)
            if end is not None and end - start > seconds + 1 / rate:
                seconds = end - start  # right for the last frame; `shown_frames` replaces the others
            yield OutputFrame(pixels, start, seconds)


def _find_end(container: Any, stream: Any) -> Fraction | None:
    """Return the time at which the last frame ends, in the file's timeline; None if it is unknown."""
    # Files may store a duration for the frame that is stored last, but not for the frame that is shown last.
    end = decoding.declared_end(container, stream)
    if "mov" in container.format.name and stream.duration:
        end = ((stream.start_time or 0) + stream.duration) * Fraction(stream.time_base)
    if end is None or not container.duration:
        return None
    # cutting a file may leave old tags, but updates its stated length
    microseconds = (container.start_time or 0) + container.duration
    return min(end, Fraction(microseconds, 1_000_000))


def _warn_of_hdr(path: Path, frame: Any) -> None:
    hdr = HDR.get(int(frame.color_trc))
    if hdr is not None:
        logger.warning(
            "%s is an HDR video (%s). Its brightness is not converted: the result looks pale, "
            "because it is marked as an ordinary video (BT.709). Convert it to SDR first.",
            path,
            hdr,
        )


class Clock:
    """Corrects the times of a video's images: exact for a constant rate, and always increasing."""

    def __init__(self, rate: Fraction, tick: Fraction) -> None:
        """Start without images.

        `rate` is in images per second; `tick` is the resolution of the file's timestamps, in seconds.
        """
        self._frame_seconds = 1 / rate
        # coarse ticks are the frame times themselves, so nothing is rounded
        self._tolerance = tick if 4 * tick <= self._frame_seconds else Fraction(0)
        self._grid_start: Fraction | None = None  # frame times are grid start + n / rate
        self._last_time = -self._frame_seconds  # corrected time of the last image
        self._offset = Fraction(0)  # added to the file's times

    def correct_start(self, time: Fraction | None) -> Fraction:
        """Return the corrected time at which the next image is shown.

        A time near the grid of the constant rate is moved onto it. If the file's times jump back, as in
        joined files, they continue after the last image. `time` is the time in the file, or None.
        """
        expected = self._last_time + self._frame_seconds  # if frames come at the constant rate
        if time is None:
            time = expected - self._offset
        if self._grid_start is None:
            # Where the grid of frame times starts; `time` is the first frame's time in the file
            # This is the multiple of the frame duration nearest to `time` if it is close, else `time`.
            nearest = round(time / self._frame_seconds) * self._frame_seconds
            self._grid_start = self._last_time = (
                nearest if abs(nearest - time) <= max(self._tolerance, START_TOLERANCE) else time
            )
            if abs(self._grid_start - time) > self._tolerance:  # MP4 rounds only the start time
                self._offset = self._grid_start - time
            return self._grid_start
        time += self._offset
        if time < self._last_time - FALL_SECONDS:  # the file's times start again: shift all that follow
            self._offset += expected - time
            time = expected
        grid_index = round((time - self._grid_start) / self._frame_seconds)
        on_grid = self._grid_start + grid_index * self._frame_seconds
        if abs(on_grid - time) <= self._tolerance and on_grid > self._last_time:
            self._last_time = on_grid
        elif time > self._last_time:
            self._last_time = time
        else:  # times have to increase
            self._last_time += self._frame_seconds / 4
        return self._last_time

    def correct_duration(self, seconds: Fraction | None) -> Fraction:
        """Return how long an image is shown, in seconds, if no other image follows.

        `seconds` is the duration that the file states, or None.
        """
        if seconds is None or abs(seconds - self._frame_seconds) <= self._tolerance:
            return self._frame_seconds
        return seconds


def _find_rate(stream: Any) -> Fraction:
    """Return the average frame rate, rounded to a standard rate if it is very close."""
    average = stream.average_rate or stream.base_rate
    if not average or average < 0:
        return DEFAULT_RATE
    for standard in (Fraction(round(average)), Fraction(round(average * 1001 / 1000) * 1000, 1001)):
        if abs(average - standard) <= standard * RATE_TOLERANCE:
            return standard
    return Fraction(average).limit_denominator(1001) or Fraction(average)


def _is_deep(frame: Any) -> bool:
    return any(part.bits > 8 for part in frame.format.components)
