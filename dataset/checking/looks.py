"""Look at a source for the page: a strip of its frames with the crop drawn in, and its numbers."""
# Letters: H, W height and width of a frame

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from markupsafe import Markup

from dataset.sources.decoding import fit_of, source_frames
from dataset.sources.fetching import fetch
from dataset.sources.frames import Span, describe_short, spans
from dataset.sources.media_source import MediaSource
from dataset.sources.moments import measure_source
from dataset.sources.rates import compare_rates
from dataset.sources.steps import Steps
from modules.errors import DatasetError, MediaError
from modules.media.animations import is_animation
from modules.media.buckets import Fit
from modules.media.reading import Frame, video_info
from modules.pages.page import embed_picture

STRIP_WIDTH, STRIP_HEIGHT = 1180, 104  # pixels of all frames of a clip side by side
PICTURE_HEIGHT = 240
MOST_FRAMES = 12  # of a strip
GAP = 4  # pixels between frames
EDGE = np.array((255, 140, 0), np.uint8)  # of the part that is kept
SHADE = 0.3  # brightness of what is cut off


@dataclass(frozen=True)
class MediaLook:
    """A source's media as the page shows them. Whatever could not be read is None or empty."""

    strip: Markup | None = None
    fit: Fit | None = None  # how a frame of `size` becomes what the model sees
    size: tuple[int, int] | None = None  # width, height
    bytes: int | None = None
    fps: float | None = None  # of the file
    frames: int | None = None  # in the file, as its header says
    used: int = 0  # frames that are used at the model's rate, as far as they are needed
    spans: tuple[Span, ...] = ()
    short: str | None = None
    problem: str | None = None
    rate_remark: str | None = None  # if the table's source_fps does not fit the file's rate

    @property
    def cut_percent(self) -> float:
        """Return how much of the picture's area is cut off."""
        if self.fit is None:
            return 0.0
        kept = self.fit.bucket[0] * self.fit.bucket[1] / (self.fit.resized[0] * self.fit.resized[1])
        return 100 * (1 - kept)

    @property
    def enlarged(self) -> float:
        """Return by how much a frame is enlarged; below 1 if it is reduced."""
        return 1.0 if self.fit is None or self.size is None else self.fit.resized[0] / self.size[0]


def look_at(source: MediaSource, fps: float, steps: Steps) -> MediaLook:
    """Read a source once; only a few small frames are kept in memory. fps: the family's rate.

    `problem` says what cannot be read; the frames before it are shown.
    """
    height = STRIP_HEIGHT if source.table.kind == "video" else PICTURE_HEIGHT
    sample = EvenFrames(lambda frame: reduce_to_height(frame, height, STRIP_WIDTH))
    look = read_source(source, fps, steps, sample.add)
    if not sample.frames:
        return look
    strip = draw_strip(fill_strip(sample.frames, STRIP_WIDTH), look.fit)
    return dataclasses.replace(look, strip=embed_picture(strip, source.path.name, STRIP_WIDTH, quality=80))


def read_source(source: MediaSource, fps: float, steps: Steps, take: Callable[[Frame], None]) -> MediaLook:
    """Read a source once and hand each used frame to `take`, at its own size: a look without strip.

    `problem` holds the reading error.
    """
    values: dict[str, object] = {}
    used = 0

    def count(frame: Frame) -> None:
        nonlocal used
        take(frame)
        used += 1

    try:
        if source.tensors is not None:
            return _look_at_tensors(source, steps)
        with fetch(source) as here:
            _read_frames(here, fps, steps, count, values)
        found = spans(source.table, used, steps.frame_step) if source.table.kind == "video" else ((0, 1),)
        values |= {"spans": found, "short": describe_short(source.table, found, used)}
    except (MediaError, DatasetError, OSError) as error:
        values["problem"] = str(error)
    return MediaLook(used=used, **values)  # type: ignore[arg-type]


def _read_frames(
    source: MediaSource,
    fps: float,
    steps: Steps,
    take: Callable[[Frame], None],
    values: dict[str, object],
) -> None:
    """Hand the frames of a source on disk to `take`; add facts found on the way to `values`."""
    values["bytes"] = _size_bytes(source)
    if source.table.kind == "video":
        info = video_info(source.path)
        values |= {"fps": info.fps, "frames": info.frames}
        if not is_animation(source.path):  # these are played by the times in the file
            values["rate_remark"] = compare_rates(info.fps, source.table.source_fps, fps)
    for frame in source_frames(source, fps):
        if "fit" not in values:
            size = (frame.shape[1], frame.shape[0])
            values |= {"size": size, "fit": fit_of(source.table, size, steps.pixel_step, source.path)}
        take(frame)


def _look_at_tensors(source: MediaSource, steps: Steps) -> MediaLook:
    """Look at a source whose latents are given: its clip, which need not be there, is not shown."""
    given = measure_source(source, steps)
    found = (given.span(steps.frame_step),)
    size_bytes = _size_bytes(source)
    return MediaLook(bytes=size_bytes, size=given.size, frames=given.frames, used=given.frames, spans=found)


class EvenFrames:
    """Evenly spaced frames of a stream of unknown length, from its first on; at most 2 * MOST_FRAMES."""

    def __init__(self, reduce: Callable[[Frame], Frame]) -> None:
        """reduce: turns a frame into its kept form; only called for kept ones."""
        self.frames: list[Frame] = []
        self._count = 0
        self._reduce = reduce
        self._step = 1

    def add(self, frame: Frame) -> None:
        if self._count % self._step == 0:
            self.frames.append(self._reduce(frame))
            if len(self.frames) > 2 * MOST_FRAMES:
                self.frames = self.frames[::2]
                self._step *= 2
        self._count += 1


def fill_strip(frames: Sequence[Frame], width: int) -> list[Frame]:
    """Return as many of the frames as fit side by side into `width` pixels, from the first to the last."""
    widest = max(frame.shape[1] for frame in frames)
    return choose_evenly(frames, min(MOST_FRAMES, (width + GAP) // (widest + GAP)))


def choose_evenly(frames: Sequence[Frame], most: int) -> list[Frame]:
    """Return at least one and at most `most` frames, evenly from the first to the last."""
    count = max(1, min(most, len(frames)))
    return [frames[index] for index in np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))]


def draw_crop(frame: Frame, fit: Fit) -> Frame:
    """Return a copy of a frame (H W 3, of any scale) with the part that is cut off dark, behind a line."""
    height, width = frame.shape[:2]
    left, top = fit.crop[0] / fit.resized[0] * width, fit.crop[1] / fit.resized[1] * height
    right = left + fit.bucket[0] / fit.resized[0] * width
    bottom = top + fit.bucket[1] / fit.resized[1] * height
    x0, y0 = max(0, round(left)), max(0, round(top))
    x1, y1 = min(width, round(right)), min(height, round(bottom))
    drawn = np.asarray(frame * SHADE, np.uint8)
    drawn[y0:y1, x0:x1] = EDGE
    drawn[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2] = frame[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2]
    return drawn


def draw_strip(frames: Iterable[Frame], fit: Fit | None) -> Frame:
    """Return frames of one height side by side, with white gaps; `fit` draws the parts cut off."""
    parts: list[Frame] = []
    for frame in frames:
        if parts:
            parts.append(np.full((frame.shape[0], GAP, 3), 255, np.uint8))
        parts.append(frame if fit is None else draw_crop(frame, fit))
    return np.concatenate(parts, axis=1)


def reduce_to_height(frame: Frame, height: int, widest: int) -> Frame:
    """Return a frame resized to `height`; one that would be wider than `widest` becomes that wide."""
    width = min(max(1, round(frame.shape[1] * height / frame.shape[0])), widest)
    method = cv2.INTER_AREA if height < frame.shape[0] else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(frame, (width, height), interpolation=method), np.uint8)


def _size_bytes(source: MediaSource) -> int | None:
    try:
        path = source.path if source.tensors is None else source.tensors.moments
        return None if path.is_dir() else path.stat().st_size
    except OSError:
        return None
