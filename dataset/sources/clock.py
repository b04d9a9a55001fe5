"""Choose the frames of control clips and mask clips that belong to the kept frames of a clip.

Only the clip's own timing decides which of its frames are kept. A control or mask clip (its companion) then
provides a frame for each of them: the frame with the same index, if both have equally many frames or the same
rate, else the frame that is shown at the same time.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.config_keys import AUTO
from dataset.sources.audio import black_frames
from dataset.sources.fetching import fetch
from dataset.sources.frames import (
    MAX_CHECKED_FILES,
    TOLERANCE,
    Mask,
    keep_pattern,
    max_decoded_frames,
    read_mask_clip,
    read_mask_image,
)
from dataset.sources.media_source import Fault, MediaSource
from dataset.table import DatasetTable
from modules.errors import MediaError
from modules.integers import ceil_div
from modules.media import reading
from modules.media.buckets import Size
from modules.media.decoding import animation_durations, is_animation
from modules.media.reading import is_single_image

# a frame, its index in the file, and the time in seconds at which companions show the same moment
SampledFrame = tuple[reading.Frame, int, float]
SAME_RATE = 1e-4  # relative difference of rates that count as equal
UNEVEN = 0.011  # seconds; frame durations that differ by less are equal, but rounded to 10 ms
MANY_FRAMES = 1000  # assumed for a clip whose header does not say how many frames it has


def kept_frames(path: Path, table: DatasetTable, fps: float, alpha: bool = False) -> Iterator[SampledFrame]:
    """Yield the frames of a clip that training uses, in their original size.

    With source_fps = "auto", and for GIF and WebP, they are the frames shown at equally spaced times. For
    other clips and folders of images, they are all frames. If source_fps is a number, frames are then dropped
    to reduce this rate to the target rate.

    Args:
        path: The clip, or a folder of images.
        table: Table of the clip.
        fps: Target rate of the model, which target_fps of the table replaces.
        alpha: Whether frames have an alpha channel if the file has one.
    """
    target_rate = table.buckets.target_fps or fps
    if table.source.is_audio_only:
        return itertools.islice(black_frames(path, target_rate), max_decoded_frames(table))
    source_rate = table.buckets.declared_fps or target_rate  # before frames are dropped
    frames: Iterable[SampledFrame]
    if _is_timed(path, table):
        frames = reading.frames_at(path, reading.frame_times(source_rate), alpha)
    elif path.is_dir():  # images have no times of their own
        images = reading.video_frames(path, alpha)
        frames = zip(images, itertools.count(), reading.frame_times(source_rate), strict=False)
    else:
        frames = _all_frames(path, alpha)
    if table.buckets.declared_fps is not None:
        frames = itertools.compress(frames, keep_pattern(table.buckets.declared_fps, target_rate))
    return itertools.islice(frames, max_decoded_frames(table))


def _all_frames(path: Path, alpha: bool) -> Iterator[SampledFrame]:
    """Yield all frames of a clip with their times, counted from the first frame."""
    first_start = None
    for index, (frame, start, end) in enumerate(reading.timed_frames(path, alpha)):
        if first_start is None:
            first_start = start
        # a moment inside the frame, so that rounded times do not select a neighbor
        yield frame, index, start - first_start + reading.PLACE_IN_FRAME * (end - start)


def companion_frames(
    path: Path,
    clip: Path,
    table: DatasetTable,
    fps: float,
    frame_times: Sequence[tuple[int, float]],
    alpha: bool = False,
) -> Iterator[reading.Frame]:
    """Yield the frame of a control clip or mask that belongs to each kept frame of its clip.

    If the companion ends before its clip, there are fewer frames, but at least one.

    Args:
        path: Control clip or mask.
        clip: Clip that it belongs to.
        table: Table of both.
        fps: Frame rate of the kept frames.
        frame_times: Index and time of each kept frame.
        alpha: Whether frames have an alpha channel, as in `kept_frames`.

    Raises:
        MediaError: If the file cannot be decoded.
    """
    if _TimingComparison(path, clip, table, fps).is_matched_by_index:  # equal frame rates or frame counts
        indices = [index for index, _ in frame_times]
        return _select_frames(reading.video_frames(path, alpha), indices)
    seconds = [second for _, second in frame_times]
    if not path.is_dir():
        return (frame for frame, _, _ in reading.frames_at(path, seconds, alpha))
    # the images of a folder have no times; they are taken to have the table's rate
    rate = table.buckets.declared_fps or table.buckets.target_fps or fps
    return _select_frames(reading.video_frames(path, alpha), [int(second * rate) for second in seconds])


def read_mask(
    path: Path,
    local: MediaSource,
    sizes: tuple[Size, Size],
    count: int,
    fps: float,
    frame_times: Sequence[tuple[int, float]],
) -> Mask:
    """Read a clip's mask for `count` kept frames: an image for all of them, or a clip.

    Args:
        path: The mask.
        local: The clip, with local files.
        sizes: Size of the clip, and of its bucket.
        count: Number of kept frames.
        fps: Frame rate of the kept frames.
        frame_times: Index and time of each kept frame.

    Raises:
        MediaError: If the mask cannot be used.
    """
    size, bucket = sizes
    fit_image = functools.partial(reading.resize_cover, bucket=bucket)
    if is_single_image(path):
        return read_mask_image(path, fit_image, size, count)
    frames = companion_frames(
        path, local.path, table=local.table, fps=fps, frame_times=frame_times, alpha=True
    )
    return read_mask_clip(path, frames, fit_image=fit_image, size=size, num_frames=count)


def _select_frames(frames: Iterator[reading.Frame], indices: Sequence[int]) -> Iterator[reading.Frame]:
    """Yield the frames at `indices`, which are ascending and may repeat."""
    # If all indices are beyond the end, the last frame is yielded.
    num_yielded = 0
    frame = None
    for index, frame in enumerate(frames):
        while num_yielded < len(indices) and indices[num_yielded] == index:
            yield frame
            num_yielded += 1
        if num_yielded == len(indices):
            return
    if not num_yielded and frame is not None:
        yield frame


def _is_timed(path: Path, table: DatasetTable) -> bool:
    """Return whether a clip's frames are picked by timestamp: animations, and source_fps "auto"."""
    return is_animation(path) or (table.buckets.source_fps == AUTO and not path.is_dir())


@dataclass(frozen=True)
class _Timing:
    """Frame count, frame rate and duration from a clip's header."""

    frames: int | None  # number of frames, if the header has it
    rate: float  # frames per second; NaN if the frames have different durations
    seconds: float  # duration; 0: unknown

    @property
    def estimated_frames(self) -> int:
        """Number of frames: from the header, else from the duration; 0 if unknown."""
        if self.frames:
            return self.frames
        return round(self.seconds * self.rate) if self.rate > 0 else 0  # False for NaN

    def describe(self) -> str:
        """Return the length as text for a message: `48 frames, 2.00 s`."""
        return f"{self.estimated_frames} frames, {self.seconds:.2f} s"


class _TimingComparison:
    """Compares the frame times of a clip and its control clip or mask, using file headers only."""

    def __init__(self, path: Path, clip: Path, table: DatasetTable, fps: float) -> None:
        self._path, self._clip_path = path, clip
        self._default_rate = table.buckets.declared_fps or table.buckets.target_fps or fps
        self._is_timed = _is_timed(path, table)
        self._clip_is_timed = _is_timed(clip, table)
        # with a number as source_fps, a folder of images has one image for each frame of the clip
        self._is_frame_folder = (
            path.is_dir() and table.buckets.declared_fps is not None and not self._clip_is_timed
        )
        self.clip = self._measure(clip)
        self.companion = self._measure(path)

    def _measure(self, path: Path) -> _Timing:
        """Read a clip's frame count, frame rate and duration."""
        info = reading.video_info(path)
        rate = info.fps or self._default_rate
        seconds = (info.frames or 0) / rate if info.seconds is None else info.seconds
        if is_animation(path):
            durations = animation_durations(path)
            if max(durations) - min(durations) >= UNEVEN:
                rate = math.nan
        return _Timing(info.frames, rate, seconds)

    @property
    def is_matched_by_index(self) -> bool:
        """Whether frames of the companion (mask or control) match the clip's by index instead of by time."""
        # the rate of a folder is only declared, so it need not be exact
        tolerance = TOLERANCE if self._clip_path.is_dir() else SAME_RATE
        if self._is_frame_folder or abs(self.companion.rate / self.clip.rate - 1) < tolerance:
            return True
        num_frames = self.companion.frames or reading.count_frames(self._path)
        return num_frames == (self.clip.frames or reading.count_frames(self._clip_path))

    @property
    def matched_earlier_versions(self) -> bool:
        """Return whether earlier versions, which timed each clip separately, picked the same frames."""
        companion_rate = self.companion.rate if self._is_timed else self._default_rate
        clip_rate = self.clip.rate if self._clip_is_timed else self._default_rate
        former_ratio = companion_rate / clip_rate
        current_ratio = 1.0 if self.is_matched_by_index else self.companion.rate / self.clip.rate
        drift = abs(former_ratio / current_ratio - 1)
        frames_apart = drift * (self.clip.estimated_frames or MANY_FRAMES)  # at the end of the clip
        return frames_apart < reading.PLACE_IN_FRAME  # False for NaN, too

    @property
    def differs_in_length(self) -> bool:
        """Return whether both the frame counts and the durations in the two file headers differ."""
        companion_frames = self.companion.estimated_frames
        clip_frames = self.clip.estimated_frames
        is_unknown = not companion_frames or not clip_frames
        if is_unknown or companion_frames in (1, clip_frames):
            return False
        companion_seconds = self.companion.seconds
        clip_seconds = self.clip.seconds
        longest_frame = max(companion_seconds / companion_frames, clip_seconds / clip_frames)
        # durations in headers may be wrong by one frame, and are rounded
        tolerance = max(1.5 * longest_frame, TOLERANCE * clip_seconds)
        return abs(companion_seconds - clip_seconds) > tolerance


def _list_moving_companions(source: MediaSource) -> Iterator[Path]:
    """Yield a clip's control clips, masks and references, without still images."""
    if source.table.kind == "video" and source.precomputed is None:
        yield from source.control
        for path in (source.mask, source.control_mask, *source.references):
            if path is not None and not is_single_image(path):
                yield path


def has_companions(source: MediaSource) -> bool:
    """Return whether a clip has control clips, masks or references, and no precomputed latents."""
    has_any = any((source.control, source.mask, source.control_mask, source.references))
    return source.table.kind == "video" and source.precomputed is None and has_any


def selects_frames_as_before(source: MediaSource, fps: float) -> bool:
    """Return whether earlier versions, which timed companions separately, picked the same companion frames.

    Only headers are read, also those of remote files and tar members.

    Raises:
        MediaError: If a header cannot be read.
    """
    with fetch(source) as local:
        paths = _list_moving_companions(local)
        return all(
            _TimingComparison(path, local.path, local.table, fps).matched_earlier_versions for path in paths
        )


OTHER_LENGTHS = (
    "control clips or masks differ from their clips in number of frames and duration; their frames at "
    "the clip's times are taken, and their last frame after their end"
)


def find_other_lengths(sources: Sequence[MediaSource], fps: float) -> list[Fault]:
    """Return a warning for each control clip or mask that differs from its clip in frame count and duration.

    Only headers of at most MAX_CHECKED_FILES local clips are read. Unreadable files are reported elsewhere.
    """
    clips = [source for source in sources if has_companions(source) and not source.remote_or_packed]
    warnings = []
    step = ceil_div(len(clips), MAX_CHECKED_FILES) or 1  # evenly spaced among all clips
    for source in clips[::step]:
        with contextlib.suppress(MediaError, OSError):
            for path in _list_moving_companions(source):
                timing = _TimingComparison(path, source.path, source.table, fps)
                if timing.differs_in_length:
                    text = f"{path}: {timing.companion.describe()}; its clip {timing.clip.describe()}"
                    warnings.append(Fault(OTHER_LENGTHS, text, source.stem, is_fatal=False))
    return warnings
