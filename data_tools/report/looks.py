"""Decode a media file once, as caching does, to get its properties, measures of its frames, and drawings."""
# Letters: H, W height and width of a frame

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from markupsafe import Markup

from data_tools.report.audio import AudioInspection, draw_audio, inspect_audio, uses_audio
from dataset.sources.decoding import (
    decode_source,
    explain_no_spans,
    find_bucket_fit,
    plan_source,
    source_frames,
)
from dataset.sources.fetching import fetch
from dataset.sources.frames import Span, compare_rates, describe_short
from dataset.sources.frames import spans as cut_spans
from dataset.sources.media_source import MediaSource
from dataset.sources.moments import full_span, measure_source
from dataset.sources.references import fit_reference
from modules.control_codes import escape_control_codes
from modules.errors import DatasetError, MediaError
from modules.media.buckets import Fit, fit_cover
from modules.media.decoding import is_animation
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
from modules.media.reading import Frame, FrameSizes, read_image, video_info
from modules.pages.page import embed_image
from protocols.data import LatentSpec

T = TypeVar("T")

MAX_FRAMES = 12  # frames of a clip that are measured or drawn
GAP = 4  # pixels between frames
EDGE = np.array((255, 140, 0), np.uint8)  # color of the frame around the part that is kept
SHADE = 0.3  # brightness of the part that is cut off
SMALL = 150  # longer side of images in groups of duplicates, in pixels
COLOR_SIDE = 4  # side of small images that distinguish duplicates from images of other colors
DIGITS = 4  # decimals of measures


@dataclass(frozen=True)
class ThumbnailSizes:
    """Sizes of the thumbnails on a page, in pixels."""

    clip_height: int
    image_height: int
    width: int  # total width of a clip's frames, side by side
    quality: int  # JPEG quality


@dataclass(frozen=True, slots=True)
class Measures:
    """Brightness, motion, sharpness and hashes of a media file; for a clip, from some of its frames."""

    brightness: float  # 0..1
    motion: float  # 0..1; 0 for an image
    sharpness: float  # the median over the frames
    is_black: bool  # all frames are black
    is_static: bool  # whether a clip is not black and nothing moves in it
    is_blurred: bool  # most frames are blurred
    is_flat: bool  # all frames have a single color, so that their hashes are meaningless
    hashes: tuple[int, ...]  # one for an image, four for a clip
    colors: bytes  # the hashed frames as 4 x 4 RGB, concatenated


@dataclass(frozen=True, slots=True)
class Inspection:
    """Size, frame rate, used frames, measures and errors of a media file, found by reading it.

    Fields are None or empty where unknown. It is kept small, because there may be a million of these.
    """

    fit: Fit | None = None  # how a frame of `size` is resized and cropped
    size: tuple[int, int] | None = None  # width, height
    file_bytes: int | None = None
    fps: float | None = None  # of the file
    frames: int | None = None  # number of frames in the header
    num_used_frames: int = 0  # at the model's frame rate
    items_by_length: tuple[tuple[int, int], ...] = ()  # (frames of an item, number of such items)
    too_short_for: str | None = None  # the target_frames for which it is too short
    no_item_reason: str | None = None  # why it gives no item although it is readable
    read_error: str | None = None  # why it cannot be read
    size_change: str | None = None  # where frames change size
    rate_warning: str | None = None  # if the table's source_fps does not fit the file's rate
    measures: Measures | None = None
    audio: AudioInspection | None = None  # audio of a clip; None: not checked
    # only for sources that a page shows
    spans: tuple[Span, ...] = ()
    strip: Markup | None = None  # some frames side by side
    thumbnail: Markup | None = None
    waveform: Markup | None = None

    @property
    def cut_percent(self) -> float:
        """Percentage of the resized image that cropping to the bucket removes."""
        return 0.0 if self.fit is None else cut_percent(self.fit)

    @property
    def scale_factor(self) -> float:
        """Factor by which the image is resized; it is enlarged if above 1."""
        return 1.0 if self.fit is None or self.size is None else self.fit.resized[0] / self.size[0]

    @property
    def seconds(self) -> float | None:
        """Duration in seconds; None if the frame rate is unknown."""
        return self.frames / self.fps if self.frames and self.fps else None


def cut_percent(fit: Fit) -> float:
    """Return the percentage of the resized image that cropping to the bucket removes."""
    return 100 * (1 - fit.bucket[0] * fit.bucket[1] / (fit.resized[0] * fit.resized[1]))


def inspect_and_measure(source: MediaSource, fps: float, latent: LatentSpec) -> Inspection:
    """Decode a media file as caching does, and measure the frames that training would use."""
    size: tuple[int, int] | None = None  # size of all frames, determined by the first frame

    def reduce(frame: Frame) -> Frame:
        """Downscale a frame for measuring; the first frame determines the size."""
        nonlocal size
        if size is None:
            height, width = frame.shape[:2]
            factor = min(1.0, SHARP_SIDE / max(height, width))
            size = max(1, round(width * factor)), max(1, round(height * factor))
        if (frame.shape[1], frame.shape[0]) == size:
            return frame
        return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8)

    sample = FrameSampler(reduce)
    inspection = _inspect_frames(source, fps, latent, sample.add)
    if inspection.read_error is None:
        inspection = _check_companions(inspection, source, fps, latent)
    measures: Measures | None = None
    if inspection.read_error is None and sample.frames:
        # the sampler collects up to twice MAX_FRAMES
        frames = select_evenly(sample.frames, MAX_FRAMES)
        measures = measure_frames(frames, source.table.kind == "video")
    # spans are left out, because there may be a million of these records
    return replace(inspection, measures=measures, spans=(), audio=_try_inspect_audio(source))


def _check_companions(
    inspection: Inspection, source: MediaSource, fps: float, latent: LatentSpec
) -> Inspection:
    """Return the inspection with the error that the source's control media or mask would cause in caching."""
    # Only `decode_source`, which caching uses too, reads control media and masks.
    if not source.control and source.mask_from is None:
        return inspection
    try:
        decode_source(
            source,
            fps,
            latent.pixel_step,
            latent.lengths,
            keeps_alpha=latent.keeps_alpha,
            has_alpha=latent.has_alpha,
        )
    except (MediaError, DatasetError, OSError) as error:
        # a source with an error has no items, and no other reason for that
        return replace(inspection, read_error=str(error), items_by_length=(), no_item_reason=None)
    return inspection


def inspect_and_draw(
    source: MediaSource, fps: float, latent: LatentSpec, sizes: ThumbnailSizes, with_audio: bool = False
) -> Inspection:
    """Decode a media file and draw a strip of its frames; only a few scaled-down frames stay in memory.

    With `with_audio`, the audio of a clip is drawn too. If a part of the file cannot be read, the result
    has a `read_error`, and the frames before that part are drawn.
    """
    is_clip = source.table.kind == "video"
    height = sizes.clip_height if is_clip else sizes.image_height

    def reduce(frame: Frame) -> Frame:
        """Scale a frame to thumbnail size."""
        method = cv2.INTER_AREA if height < frame.shape[0] else cv2.INTER_CUBIC
        return _scale(frame, height, sizes.width, method)

    sample = FrameSampler(reduce)
    inspection = _inspect_frames(source, fps, latent, sample.add)
    if sample.frames:
        name = escape_control_codes(source.path.name)
        # as many frames of equal height next to each other as fit in the width
        widest = max(frame.shape[1] for frame in sample.frames)
        maximum = min(MAX_FRAMES, (sizes.width + GAP) // (widest + GAP))
        gap = np.full((sample.frames[0].shape[0], GAP, 3), 255, np.uint8)
        parts: list[Frame] = []
        for frame in select_evenly(sample.frames, maximum):
            if parts:
                parts.append(gap)
            parts.append(frame if inspection.fit is None else draw_crop(frame, inspection.fit))
        strip = np.concatenate(parts, axis=1)
        middle = sample.frames[len(sample.frames) // 2]
        inspection = replace(
            inspection,
            strip=embed_image(strip, name, sizes.width, quality=sizes.quality),
            thumbnail=embed_image(middle, name, SMALL, quality=70),
        )
    return _add_audio(inspection, source, fps) if with_audio and inspection.num_used_frames else inspection


def _scale(frame: Frame, height: int, max_width: int, method: int) -> Frame:
    """Resize a frame to a height; if the result is wider than `max_width`, squeeze it."""
    width = round(frame.shape[1] * height / frame.shape[0])
    width = min(max(1, width), max_width)
    return np.asarray(cv2.resize(frame, (width, height), interpolation=method), np.uint8)


def _add_audio(inspection: Inspection, source: MediaSource, fps: float) -> Inspection:
    """Add a clip's audio properties from its headers, and a drawing of the waveform of its used frames."""
    audio = _try_inspect_audio(source)
    waveform: Markup | None = None
    if audio is not None and audio.track is not None:
        with contextlib.suppress(MediaError, OSError):  # caching reports damaged files
            waveform = draw_audio(source, fps, inspection.num_used_frames)
    return replace(inspection, audio=audio, waveform=waveform)


def inspect_header(source: MediaSource, fps: float, latent: LatentSpec) -> Inspection:
    """Inspect a media file by its header; decode a clip only if its header has no frame count."""
    try:
        with fetch(source) as local_source:
            plan = plan_source(local_source, fps, latent.pixel_step, latent.lengths)
            info = video_info(local_source.path) if source.table.media_kind == "video" else None
    except (MediaError, DatasetError, OSError) as error:
        return Inspection(read_error=str(error))
    return Inspection(
        fit=find_bucket_fit(source.table, plan.size, latent.pixel_step, source.path),
        size=plan.size,
        fps=info.fps if info else None,
        frames=info.frames if info else None,
        items_by_length=_count_lengths(plan.spans),
        no_item_reason=plan.reason,
        audio=_try_inspect_audio(source),
    )


def _try_inspect_audio(source: MediaSource) -> AudioInspection | None:
    """Return a clip's audio properties; None if training does not use its audio, or if it is unreadable."""
    if uses_audio(source.table):
        with contextlib.suppress(MediaError, DatasetError, OSError):
            return inspect_audio(source)
    return None


def _inspect_frames(
    source: MediaSource, fps: float, latent: LatentSpec, use_frame: Callable[[Frame], None]
) -> Inspection:
    """Pass each used frame of a media file to `use_frame`, at its own size; return what reading reveals."""
    # An error is not raised: the result has a `read_error`, and the fields that were known before it.
    inspection_fields: dict[str, Any] = {}  # of `Inspection`; filled while the file is read
    try:
        if source.precomputed is not None:  # the clip itself is not read and may be missing
            tensors = measure_source(source, latent)
            inspection_fields |= {
                "spans": (full_span(tensors, latent.lengths),),
                "size": tensors.size,
                "fit": fit_cover(tensors.size, tensors.size),
                "frames": tensors.kept_frames,
                "num_used_frames": tensors.kept_frames,
                "file_bytes": _read_file_size(source),
            }
        else:
            with fetch(source) as local_source:
                _read_frames(
                    local_source, fps, latent, use_frame=use_frame, inspection_fields=inspection_fields
                )
            # the frame spans of the items, or the reason why there are none
            num_frames = inspection_fields["num_used_frames"]
            spans: Sequence[Span] = ((0, 1),)
            reason = None
            if source.table.kind == "video":
                spans = cut_spans(source.table, num_frames, latent.lengths)
                reason = (
                    None
                    if spans
                    else explain_no_spans(source.table, num_frames, inspection_fields.get("frames"))
                )
            inspection_fields |= {
                "spans": spans,
                "no_item_reason": reason,
                "too_short_for": describe_short(source.table, spans, num_frames),
            }
        inspection_fields["items_by_length"] = _count_lengths(inspection_fields["spans"])
    except (MediaError, DatasetError, OSError) as error:
        inspection_fields["read_error"] = str(error)
    return Inspection(**inspection_fields)


def _read_frames(
    source: MediaSource,
    fps: float,
    latent: LatentSpec,
    use_frame: Callable[[Frame], None],
    inspection_fields: dict[str, Any],
) -> None:
    """Pass each frame of a media file to `use_frame`, and fill `inspection_fields` with the results."""
    # They are filled step by step, because a file that cannot be decoded to its end is still described.
    table = source.table
    inspection_fields["num_used_frames"] = 0
    inspection_fields["file_bytes"] = _read_file_size(source)
    if table.media_kind == "video":
        info = video_info(source.path)
        inspection_fields["fps"] = info.fps
        inspection_fields["frames"] = info.frames
        if not is_animation(source.path):  # these are played by the times in the file
            inspection_fields["rate_warning"] = compare_rates(info.fps, table.buckets.source_fps, fps)
    sizes = FrameSizes()
    for frame in sizes.watch(source_frames(source, fps)):
        if "fit" not in inspection_fields:
            size = (frame.shape[1], frame.shape[0])
            inspection_fields["fit"] = find_bucket_fit(table, size, latent.pixel_step, source.path)
            inspection_fields["size"] = size
        use_frame(frame)
        inspection_fields["num_used_frames"] += 1
    inspection_fields["size_change"] = sizes.change


def _count_lengths(spans: Sequence[Span]) -> tuple[tuple[int, int], ...]:
    """Return (frames, number of items) pairs, sorted by frames."""
    return tuple(sorted(Counter(length for _, length in spans).items()))


def _read_file_size(source: MediaSource) -> int | None:
    """Return the size of a media file in bytes; None for a folder or an unreadable file."""
    try:
        path = source.path if source.precomputed is None else source.precomputed.moments
        return None if path.is_dir() else path.stat().st_size
    except OSError:
        return None


class FrameSampler:
    """Collect at most 2 * MAX_FRAMES evenly spaced frames of a stream of unknown length."""

    def __init__(self, reduce: Callable[[Frame], Frame]) -> None:
        """Start without frames; `reduce` scales down each frame that is collected."""
        self.frames: list[Frame] = []
        self._num_seen = 0
        self._reduce = reduce
        self._step = 1

    def add(self, frame: Frame) -> None:
        """Store a scaled-down frame if its index is a multiple of the current step.

        When too many frames are stored, the step doubles and every second stored frame is dropped.
        """
        if self._num_seen % self._step == 0:
            self.frames.append(self._reduce(frame))
            if len(self.frames) > 2 * MAX_FRAMES:
                self.frames = self.frames[::2]
                self._step *= 2
        self._num_seen += 1


def select_evenly(items: Sequence[T], maximum: int) -> list[T]:
    """Return at most `maximum` items (at least one), evenly spaced from the first to the last."""
    count = max(1, min(maximum, len(items)))
    indices = np.linspace(0, len(items) - 1, count).round().astype(int)
    return [items[index] for index in np.unique(indices)]


def draw_crop(frame: Frame, fit: Fit) -> Frame:
    """Return a copy of a frame (H W 3) in which the area that cropping removes is darkened."""
    height, width = frame.shape[:2]
    left = fit.crop[0] / fit.resized[0] * width
    top = fit.crop[1] / fit.resized[1] * height
    right = left + fit.bucket[0] / fit.resized[0] * width
    bottom = top + fit.bucket[1] / fit.resized[1] * height
    x0, x1 = max(0, round(left)), min(width, round(right))
    y0, y1 = max(0, round(top)), min(height, round(bottom))
    inside_border = (slice(y0 + 2, y1 - 2), slice(x0 + 2, x1 - 2))
    drawn = np.asarray(frame * SHADE, np.uint8)
    drawn[y0:y1, x0:x1] = EDGE
    drawn[inside_border] = frame[inside_border]
    return drawn


def measure_frames(frames: Sequence[Frame], is_clip: bool) -> Measures:
    """Measure brightness, motion, sharpness and hashes of an image or a clip, from frames of one size."""
    are_black = all(map(is_black, frames))
    are_flat = [is_flat(frame) for frame in frames]
    sharpnesses = [sharpness(frame) for frame in frames]
    # single-color frames are not sharp either, but do not count as blurred
    num_blurred = sum(
        frame_sharpness < BLURRED and not frame_is_flat
        for frame_sharpness, frame_is_flat in zip(sharpnesses, are_flat, strict=True)
    )
    small_colors = [_small_colors(frame) for frame in hashed_frames(frames)]
    can_move = is_clip and len(frames) > 1 and not are_black
    return Measures(
        brightness=round(float(np.mean([brightness(frame) for frame in frames])), DIGITS),
        motion=round(motion(frames), DIGITS),
        sharpness=round(float(np.median(sharpnesses)), DIGITS),
        is_black=are_black,
        is_static=can_move and is_static(frames),
        is_blurred=num_blurred > len(frames) / 2,
        is_flat=all(are_flat),
        hashes=clip_hash(frames),
        colors=b"".join(small_colors),
    )


def _small_colors(frame: Frame) -> bytes:
    """Return a tiny copy of a frame as bytes, for comparing frames."""
    small = cv2.resize(frame, (COLOR_SIDE, COLOR_SIDE), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.uint8).tobytes()


# --- the reference images of an image, next to the image itself
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShownReference:
    """A reference or control image as it is shown on a card."""

    name: str
    picture: Markup | None = None
    text: str = ""  # its size and how it is resized, or why it cannot be used
    is_bad: bool = False


def show_references(
    source: MediaSource, image: Fit | None, sizes: ThumbnailSizes
) -> Sequence[ShownReference]:
    """Return thumbnails of the control images of an image; () for clips.

    `image` says how the image itself is resized and cropped; None if it cannot be read.
    """
    if source.table.kind == "video" or not source.control:
        return ()
    names = [escape_control_codes(path.name) for path in source.control]
    try:
        with fetch(source) as local_source:
            return [
                _show_reference(source, path, name, image=image, sizes=sizes)
                for path, name in zip(local_source.control, names, strict=True)
            ]
    except MediaError as error:  # downloading the control images failed
        return [ShownReference(name, text=str(error), is_bad=True) for name in names]


def _show_reference(
    source: MediaSource, path: Path, name: str, image: Fit | None, sizes: ThumbnailSizes
) -> ShownReference:
    """Return the thumbnail of a control image, with the crop that training applies."""
    # `path` is its local file, `name` the caption below the drawing, and `image` the fit of the main image.
    bucket = None if image is None else image.bucket
    fit = None
    try:
        frame = read_image(path)
        size = (frame.shape[1], frame.shape[0])
        if source.table.references.rules is not None:
            fit = fit_reference(source.table, size, path, bucket, count=len(source.control))
    except MediaError as error:
        return ShownReference(name, text=str(error), is_bad=True)
    # tables without rules for references crop them to the image's bucket
    if fit is None and bucket is not None:
        fit = fit_cover(size, bucket)
    thumbnail = _scale(frame, sizes.image_height, sizes.width, cv2.INTER_AREA)
    text = f"{size[0]} x {size[1]}"
    if fit is not None:
        thumbnail = draw_crop(thumbnail, fit)
        text += f" → {fit.bucket[0]} x {fit.bucket[1]}"
    picture = embed_image(thumbnail, name, sizes.width, quality=sizes.quality)
    return ShownReference(name, picture, text)
