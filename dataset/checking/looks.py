"""Look at a source for the page: a strip of its frames with the crop drawn in, and its numbers."""
# Letters: H, W height and width of a frame

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from markupsafe import Markup

from dataset.sources.decoding import bucket_of, source_frames
from dataset.sources.fetching import fetch
from dataset.sources.frames import Span, describe_short, spans
from dataset.sources.media_source import MediaSource
from modules.contract.family import LatentSpec
from modules.errors import DatasetError, MediaError
from modules.media.animations import is_animation
from modules.media.buckets import Fit, fit_cover
from modules.media.reading import Frame, video_info
from modules.pages.embedding import embed_picture

STRIP_WIDTH, STRIP_HEIGHT = 1180, 104  # pixels of all frames of a clip side by side
PICTURE_HEIGHT = 240
MOST_FRAMES = 12  # of a strip
GAP = 4  # pixels between frames
EDGE = np.array((255, 140, 0), np.uint8)  # of the part that is kept
FPS_TOLERANCE = 0.02  # 29.97 is 30
SHADE = 0.3  # brightness of what is cut off


@dataclass(frozen=True)
class Look:
    """What the page shows of a source's media. Whatever could not be read is None or empty."""

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


def look_at(source: MediaSource, fps: float, latent: LatentSpec) -> Look:
    """Read a source once; only a few small frames are kept in memory. fps: the family's rate.

    What cannot be read is told in `problem`; the frames before it are shown.
    """
    sample = _Sample(PICTURE_HEIGHT if source.table.kind == "image" else STRIP_HEIGHT)
    values: dict[str, object] = {}
    try:
        with fetch(source) as here:
            _look(here, fps, latent, sample, values)
    except (MediaError, DatasetError, OSError) as error:
        values["problem"] = str(error)
    frames = list(sample.chosen())
    if frames:
        fit = values.get("fit")
        strip = _strip(frames, fit if isinstance(fit, Fit) else None)
        values["strip"] = embed_picture(strip, source.path.name, STRIP_WIDTH, quality=80)
    return Look(used=sample.count, **values)  # type: ignore[arg-type]


def _look(
    source: MediaSource, fps: float, latent: LatentSpec, sample: "_Sample", values: dict[str, object]
) -> None:
    """Read a source that is on disk: add its frames to `sample`, and fields of Look to `values`."""
    is_clip, fit = source.table.kind == "video", None
    values["bytes"] = _size_bytes(source)
    if is_clip:
        info = video_info(source.path)
        values |= {"fps": info.fps, "frames": info.frames}
        if not is_animation(source.path):  # these are played by the times in the file
            values["rate_remark"] = _compare_rates(info.fps, source.table.source_fps, fps)
    for frame in source_frames(source, fps):
        if fit is None:
            size = (frame.shape[1], frame.shape[0])
            values["size"] = size
            bucket = bucket_of(source.table, size, latent.pixel_step, source.path)
            fit = values["fit"] = fit_cover(size, bucket)
        sample.add(frame)
    found = spans(source.table, sample.count, latent.frame_step) if is_clip else ((0, 1),)
    values |= {"spans": found, "short": describe_short(source.table, found, sample.count)}


class _Sample:
    """Evenly spaced frames of a stream of unknown length, reduced to a height; at most 2 * MOST_FRAMES."""

    def __init__(self, height: int) -> None:
        self.count = 0
        self._height = height
        self._step = 1
        self._frames: list[Frame] = []

    def add(self, frame: Frame) -> None:
        if self.count % self._step == 0:
            self._frames.append(_reduce(frame, self._height))
            if len(self._frames) > 2 * MOST_FRAMES:
                self._frames = self._frames[::2]
                self._step *= 2
        self.count += 1

    def chosen(self) -> Iterator[Frame]:
        """Yield as many of them as fit into a strip, from the first to the last."""
        if not self._frames:
            return
        width = max(frame.shape[1] for frame in self._frames)
        most = max(1, min(MOST_FRAMES, (STRIP_WIDTH + GAP) // (width + GAP), len(self._frames)))
        for index in np.unique(np.linspace(0, len(self._frames) - 1, most).round().astype(int)):
            yield self._frames[index]


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


def _strip(frames: Iterable[Frame], fit: Fit | None) -> Frame:
    """Return frames of one height side by side, with white gaps."""
    parts: list[Frame] = []
    for frame in frames:
        if parts:
            parts.append(np.full((frame.shape[0], GAP, 3), 255, np.uint8))
        parts.append(frame if fit is None else draw_crop(frame, fit))
    return np.concatenate(parts, axis=1)


def _reduce(frame: Frame, height: int) -> Frame:
    width = min(max(1, round(frame.shape[1] * height / frame.shape[0])), STRIP_WIDTH)
    method = cv2.INTER_AREA if height < frame.shape[0] else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(frame, (width, height), interpolation=method), np.uint8)


def _compare_rates(found: float | None, stated: object, fps: float) -> str | None:
    """Say what is wrong if the file's rate is neither the stated one nor, if none is stated, the family's."""
    is_number = isinstance(stated, (int, float))
    if not found or (stated is not None and not is_number):
        return None
    expected = float(stated) if isinstance(stated, (int, float)) else fps
    if abs(found / expected - 1) < FPS_TOLERANCE:
        return None
    cause = f"source_fps says {expected:g}" if is_number else "without source_fps all frames are used"
    return f"{cause}: the model sees it at {expected / found:.2g} times its speed"


def _size_bytes(source: MediaSource) -> int | None:
    try:
        return None if source.path.is_dir() else source.path.stat().st_size
    except OSError:
        return None
