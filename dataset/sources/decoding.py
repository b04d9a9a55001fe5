"""Turn a source into items to encode: decode once, keep and resize frames, choose the bucket, cut spans."""

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataset.config import DatasetTable
from dataset.sources.frames import Span, frames_wanted, keep_pattern, resample_indices, spans
from dataset.sources.listing import MediaSource
from modules.errors import DatasetError, MediaError
from modules.media.buckets import Size, bucket_sizes, choose_bucket
from modules.media.reading import Frame, image_size, read_image, resize_cover, video_frames, video_info

Clip = NDArray[np.uint8]  # F H W C

NO_FRAMES: Clip = np.empty((0, 0, 0, 3), np.uint8)
LARGE = 1 << 14  # the side of a picture that no table finds too small
GROWTH = 64  # frames by which memory grows at a time
IMAGE_SPANS: tuple[Span, ...] = ((0, 1),)


@dataclass(frozen=True)
class Item:
    """An item to encode: an image, or a span of a clip."""

    source: MediaSource
    key: str  # for messages: "clip_00000-017" or "pic"
    span: Span  # first kept frame, number of frames; (0, 1) for images
    size: Size  # of the original, upright
    bucket: Size  # of the frames


@dataclass(frozen=True)
class DecodedSource:
    """The kept frames of one source, resized to its bucket. Images have one frame."""

    source: MediaSource
    size: Size
    bucket: Size
    frames: Clip  # F H W 3; empty from `plan_source`
    # per control image or clip: as many frames; C = 4 if a control image has alpha
    control: tuple[Clip, ...]
    spans: tuple[Span, ...]
    reason: str | None  # why there is no span: "12 frames, the shortest of target_frames is 17"
    alpha: NDArray[np.uint8] | None = None  # H W, of an image with transparency

    @property
    def items(self) -> tuple[Item, ...]:
        """Return one item per span."""
        is_image = self.source.table.kind == "image"
        keys = [
            self.source.stem if is_image else f"{self.source.stem}_{start:05d}-{length:03d}"
            for start, length in self.spans
        ]
        return tuple(
            Item(self.source, key, span, self.size, self.bucket)
            for key, span in zip(keys, self.spans, strict=True)
        )

    def crop(self, span: Span) -> Clip:
        """Return the frames of a span, F H W 3, not copied."""
        return _cut(self.frames, span)

    def control_crops(self, span: Span) -> tuple[Clip, ...]:
        """Return the frames of a span for each control, F H W C, not copied."""
        return tuple(_cut(frames, span) for frames in self.control)


def decode_source(source: MediaSource, fps: float, step: int = 16, frame_step: int = 4) -> DecodedSource:
    """Read a source and its control media.

    Memory holds the whole clip at bucket size, and one frame at a time at its own size. fps: the family's
    rate, reached by dropping frames if the table has source_fps. step, frame_step: of the family's
    LatentSpec. Raises MediaError if a file is unreadable or too small, DatasetError if the resolution is not
    a multiple of `step`.
    """
    table = source.table
    if table.kind == "image":
        image, alpha = _colours_and_alpha(read_image(source.path, alpha=True))
        size = (image.shape[1], image.shape[0])
        bucket = bucket_of(table, size, step, source.path)
        control = tuple(_control_image(read_image(path, alpha=True), bucket) for path in source.control)
        alpha = None if alpha is None or alpha.min() == 255 else resize_cover(alpha, bucket)
        return DecodedSource(
            source, size, bucket, resize_cover(image, bucket)[None], control, IMAGE_SPANS, None, alpha
        )
    decoded = _kept_frames(source.path, table, fps)
    first = next(decoded)
    size = (first.shape[1], first.shape[0])
    bucket = bucket_of(table, size, step, source.path)
    frames = _gather(itertools.chain([first], decoded), bucket, frames_wanted(table))
    found, reason = _spans_or_reason(table, len(frames), frame_step)
    control = (
        tuple(_control_clip(path, table, fps, bucket, len(frames)) for path in source.control)
        if found
        else ()
    )
    return DecodedSource(source, size, bucket, frames, control, found, reason)


def plan_source(source: MediaSource, fps: float, step: int = 16, frame_step: int = 4) -> DecodedSource:
    """Do the same as `decode_source` from headers, without frames, to compare with caches without a record.

    A header may have a wrong number of frames; a clip whose header has none is decoded. Raises the errors of
    `decode_source` that headers show.
    """
    table = source.table
    if table.kind == "image":
        size = image_size(source.path)
        return DecodedSource(
            source, size, bucket_of(table, size, step, source.path), NO_FRAMES, (), IMAGE_SPANS, None
        )
    info = video_info(source.path)
    size = (info.width, info.height)
    if info.frames is None:
        kept = sum(1 for _ in _kept_frames(source.path, table, fps))
    else:
        kept = len(resample_indices(info.frames, table.source_fps, fps))
    found, reason = _spans_or_reason(table, kept, frame_step)
    return DecodedSource(
        source, size, bucket_of(table, size, step, source.path), NO_FRAMES, (), found, reason
    )


def source_frames(source: MediaSource, fps: float) -> Iterator[Frame]:
    """Yield the frames of a source that are used, H W 3, at their own size: one of an image.

    Raises MediaError if the file cannot be read.
    """
    if source.table.kind == "image":
        yield read_image(source.path)
    else:
        yield from _kept_frames(source.path, source.table, fps)


def bucket_of(table: DatasetTable, size: Size, step: int, path: Path | None = None) -> Size:
    """Return the size that an image of `size` is resized to. path: for messages.

    Raises MediaError if the image is too small to keep its size, DatasetError if the resolution does not fit
    `step`.
    """
    width, height = table.resolution
    if not table.enable_bucket:
        if width % step or height % step:
            down, up = (
                (width // step * step, height // step * step),
                (-(-width // step) * step, -(-height // step) * step),
            )
            options = " or ".join(str(list(option)) for option in dict.fromkeys((down, up)) if min(option))
            raise DatasetError(
                f"{table.name}: resolution = [{width}, {height}] is not a multiple of {step}, and "
                f"enable_bucket is false. Use {options}, or enable_bucket = true."
            )
        return table.resolution
    try:
        sizes = _bucket_sizes(width, height, step)
    except ValueError as error:
        raise DatasetError(f"{table.name}: resolution = [{width}, {height}]: {error}. Enlarge it.") from None
    try:
        return choose_bucket(size, sizes, width * height, step, table.bucket_no_upscale)
    except ValueError as error:
        raise MediaError(f"{path or 'an image'} is too small: {error}") from None


def check_resolution(table: DatasetTable, step: int) -> None:
    """Raise DatasetError if a table's resolution does not fit `step`, of the family's LatentSpec."""
    bucket_of(table, (LARGE, LARGE), step)


_bucket_sizes = functools.cache(bucket_sizes)


def _kept_frames(path: Path, table: DatasetTable, fps: float) -> Iterator[Frame]:
    """Yield the frames kept at `fps`, at their own size, no more than the table needs."""
    kept = (
        frame
        for frame, keep in zip(video_frames(path), keep_pattern(table.source_fps, fps), strict=False)
        if keep
    )
    return itertools.islice(kept, frames_wanted(table))


def _gather(frames: Iterable[Frame], bucket: Size, wanted: int | None) -> Clip:
    """Collect frames at bucket size in one growing array, so that a clip is never copied."""
    width, height = bucket
    clip, count = np.empty((min(wanted or GROWTH, GROWTH), height, width, 3), np.uint8), 0
    for frame in frames:
        if count == len(clip):
            # no other reference to the array exists yet
            clip.resize((count + max(GROWTH, count // 4), height, width, 3), refcheck=False)
        clip[count] = resize_cover(frame, bucket)
        count += 1
    clip.resize((count, height, width, 3), refcheck=False)
    return clip


def _colours_and_alpha(image: Frame) -> tuple[Frame, NDArray[np.uint8] | None]:
    """Split an image into H W 3 and its fourth channel, H W, or None."""
    alpha = image[..., 3] if image.shape[2] == 4 else None
    return np.ascontiguousarray(image[..., :3]), None if alpha is None else np.ascontiguousarray(alpha)


def _control_image(image: Frame, bucket: Size) -> Clip:
    """Resize a control image to 1 H W C.

    Alpha is resized separately from the colours: Pillow would darken these by it, and generation does not.
    """
    colours, alpha = _colours_and_alpha(image)
    parts = [resize_cover(colours, bucket)] + (
        [] if alpha is None else [resize_cover(alpha, bucket)[..., None]]
    )
    return np.concatenate(parts, axis=2)[None]


def _control_clip(path: Path, table: DatasetTable, fps: float, bucket: Size, num_frames: int) -> Clip:
    """Read `num_frames` control frames; a longer clip is cut, a shorter one repeats its last frame."""
    kept = itertools.islice(_kept_frames(path, table, fps), num_frames)
    frames = _gather(kept, bucket, num_frames)
    return (
        np.concatenate([frames, *[frames[-1:]] * (num_frames - len(frames))])
        if len(frames) < num_frames
        else frames
    )


def _spans_or_reason(table: DatasetTable, kept: int, frame_step: int) -> tuple[tuple[Span, ...], str | None]:
    found = spans(table, kept, frame_step)
    if found:
        return found, None
    rate = f" after dropping from source_fps = {table.source_fps:g}" if table.source_fps else ""
    return (), f"{kept} frames{rate}, the shortest of target_frames is {min(table.target_frames)}"


def _cut(frames: Clip, span: Span) -> Clip:
    start, length = span
    return frames[start : start + length]
