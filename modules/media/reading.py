"""Read images and videos from disk as uint8 frames; no other file reads them.

A frame is `H W C` uint8 RGB (C = 4 with alpha); sizes are (width, height). A "video" may also be a folder of
images, which are its frames in the order of the numbers in their names. Colors are converted according to
the file's own metadata. Every failure is a MediaError with the file and the reason.
"""

import contextlib
import functools
import importlib
import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from modules.errors import MediaError
from modules.limits import MAX_SHOWN_SECONDS, MAX_TAG_CHARACTERS
from modules.media import decoding
from modules.media.buckets import Fit, Size, fit_cover
from modules.media.colors import (
    HDR,
    Colors,
    apply_orientation,
    blend_on_white,
    code_transform,
    coded_pixels,
    inspect_colors,
    row_blocks,
    shown_pixels,
)
from modules.media.colors import Frame as Frame
from modules.media.opening import AUDIO_FORMATS, open_container, open_image, open_video, reading
from modules.paths import sort_by_numbers

# lower case
VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg"})

TIFF_SUFFIXES = frozenset({".tif", ".tiff"})
# suffixes of images that Pillow always reads, lower case
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"}) | TIFF_SUFFIXES

# fraction of a frame's duration at a new rate at which its image is selected: away from image boundaries at
# the usual rates, because files round their times to milliseconds
PLACE_IN_FRAME = 0.3

PILLOW_METHODS = {
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "antialiased bicubic": Image.Resampling.BICUBIC,
}
OPENCV_METHODS = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "linear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "lanczos4": cv2.INTER_LANCZOS4,
}

PROGRESSIVE = 1  # FFmpeg's field orders: 0 unknown, above 1 interlaced
ONE_COLOR = 2  # of 255; tolerance of one color, because programs round transparent pixels
TIFF_WIDTH, TIFF_HEIGHT = 0x0100, 0x0101  # TIFF tags of the stored size


@dataclass(frozen=True)
class VideoInfo:
    """Size of a video's upright frames, and their count, rate and duration if its header states them."""

    width: int
    height: int
    frames: int | None
    fps: float | None
    seconds: float | None = None


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of readable images, in lower case.

    They include .avif, .heic and .jxl if the installed Pillow can decode these formats.
    """
    for plugin in ("pillow_jxl", "pillow_avif"):  # optional packages that register themselves with Pillow
        with contextlib.suppress(ImportError):
            importlib.import_module(plugin)
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    has_avif = features.check("avif") or "AVIF" in Image.OPEN and "pillow_avif" in str(Image.OPEN["AVIF"])
    Image.init()
    registered = {".jxl", ".heic", ".heif"} & Image.registered_extensions().keys()
    return IMAGE_SUFFIXES | registered | ({".avif"} if has_avif else set())


def is_single_image(path: Path) -> bool:
    """Return whether a path is a still image, not an animation or a folder of frames."""
    return path.suffix.lower() in image_suffixes() and not path.is_dir() and not decoding.is_animation(path)


def read_image(path: Path, alpha: bool = False) -> Frame:
    """Read an image as a viewer shows it, upright, in sRGB and on white: H W 3 RGB.

    With `alpha`, an image with transparency is returned as H W 4; transparent pixels keep their colors.

    Raises:
        MediaError: If the image cannot be read.
    """
    with open_image(path) as file:
        return shown_pixels(path, apply_orientation(file), alpha)


def add_alpha(frame: Frame) -> Frame:
    """Return a frame with an alpha channel, H W 4; a frame without one becomes opaque."""
    if frame.shape[2] == 4:
        return frame
    return np.dstack([frame, np.full(frame.shape[:2], 255, np.uint8)])


def split_alpha(frame: Frame) -> tuple[Frame, NDArray[np.uint8] | None]:
    """Split a frame into its colors, H W 3, and its alpha channel, H W; None if it has no alpha."""
    alpha = frame[..., 3] if frame.shape[2] == 4 else None
    return np.ascontiguousarray(frame[..., :3]), None if alpha is None else np.ascontiguousarray(alpha)


def join_alpha(colors: Frame, alpha: NDArray[np.uint8] | None) -> Frame:
    """Join colors and alpha, resized to the colors, to H W 4; return the colors if alpha is None."""
    if alpha is None:
        return colors
    height, width = colors.shape[:2]
    if alpha.shape != (height, width):
        alpha = resize_frame(alpha, (width, height), "lanczos")
    return np.dstack([colors, alpha])


def media_colors(path: Path) -> Colors:
    """Return facts about the colors of an image, of a clip (from its first frame) or of a folder of images.

    Animated GIF and WebP files never count as transparent: they are composited on white.

    Raises:
        MediaError: If it cannot be read.
    """
    if path.is_dir():
        image_colors = [media_colors(image) for image in folder_images(path)]
        return Colors(
            is_transparent=any(colors.is_transparent for colors in image_colors),
            is_converted=any(colors.is_converted for colors in image_colors),
            rejection=next((colors.rejection for colors in image_colors if colors.rejection), None),
            by_codes=any(colors.by_codes for colors in image_colors),
        )
    if path.suffix.lower() in VIDEO_SUFFIXES:
        with open_video(path) as (container, stream):
            codec = stream.codec_context
            has_alpha = codec.format is not None and decoding.has_alpha(codec)
            is_transparent = False
            if has_alpha or decoding.hides_alpha(stream):
                # Whether the first frame of a clip with an alpha channel has transparent parts
                first = next(decoding.decode_frames(path, container, stream)).frame
                on_white = decoding.frame_pixels(first, stream)
                without_alpha = first.to_ndarray(format="rgb24", threads=1)
                is_transparent = not np.array_equal(on_white, without_alpha)
            is_converted = code_transform(codec) is not None
            return Colors(
                is_transparent=is_transparent,
                is_converted=is_converted,
                hdr=HDR.get(int(codec.color_trc)),
                is_interlaced=int(codec.field_order) > PROGRESSIVE,
                by_codes=is_converted,
                is_square=decoding.square_width(codec, stream) == codec.width,
            )
    with open_image(path) as file:
        colors = inspect_colors(path, file)
        return replace(colors, is_transparent=False) if decoding.is_animation(path) else colors


def read_mask(path: Path) -> Frame:
    """Read a mask, H W 3, that is white where it is set. A mask drawn by alpha is set where it is opaque.

    Raises MediaError if it cannot be read.
    """
    detector = MaskChannelDetector()
    on_white, opacity = detector.add(read_image(path, alpha=True))
    return np.repeat(opacity[..., None], 3, axis=2) if detector.is_alpha else on_white


class MaskChannelDetector:
    """Finds out whether a clip's frames draw a mask by alpha instead of brightness.

    A mask is drawn by alpha if it has transparent parts and all visible parts have the same color.
    """

    def __init__(self) -> None:
        self._min_color = np.full(3, 255)
        self._max_color = np.zeros(3, int)
        self._is_transparent = False

    def add(self, frame: Frame) -> tuple[Frame, Frame]:
        """Record the transparency and the range of colors of a mask frame, H W 3 or 4.

        Returns its colors on white, H W 3, and its alpha, H W.
        """
        if frame.shape[2] == 3:
            opacity = np.full(frame.shape[:2], 255, np.uint8)
            on_white = frame
        else:
            opacity = np.ascontiguousarray(frame[..., 3])
            on_white = blend_on_white(frame)
            self._is_transparent = self._is_transparent or int(opacity.min()) < 255
        for rows in row_blocks(frame.shape[0], frame.shape[1]):
            visible = frame[rows, :, :3][opacity[rows] > 127]
            if len(visible):
                self._min_color = np.minimum(self._min_color, visible.min(0))
                self._max_color = np.maximum(self._max_color, visible.max(0))
        return on_white, opacity

    @property
    def is_alpha(self) -> bool:
        """Whether, after the frames read so far, the mask is defined by alpha instead of brightness."""
        return self._is_transparent and int((self._max_color - self._min_color).max()) <= ONE_COLOR


def image_size(path: Path) -> Size:
    """Return (width, height) of the upright image, read from its header.

    Raises:
        MediaError: If it cannot be read.
    """
    with open_image(path) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow has already rotated its size
            width, height = (int(image.getexif()[tag]) for tag in (TIFF_WIDTH, TIFF_HEIGHT))
        is_sideways = image.getexif().get(decoding.EXIF_ORIENTATION, 1) >= 5
        return (height, width) if is_sideways else (width, height)


def resize_cover(
    frame: Frame, bucket: Size, shrink: str = "area", place: tuple[float, float] | None = None
) -> Frame:
    """Resize a frame until it covers `bucket`, and crop the center.

    Enlarging uses Lanczos, shrinking area averaging, as the cache format requires; with `shrink` "lanczos",
    both use Lanczos. `place` replaces the center: offsets from left and top as fractions in [0, 1) of the
    range of possible crops.
    """
    size = frame.shape[1], frame.shape[0]
    if size == bucket:
        return frame
    fit = fit_cover(size, bucket)
    return fit_frame(frame, replace(fit, interpolation="lanczos") if shrink == "lanczos" else fit, place)


def fit_frame(frame: Frame, fit: Fit, place: tuple[float, float] | None = None) -> Frame:
    """Resize and crop a frame according to `fit`.

    `place` is the position of the crop: fractions of its range from left and top; None is the center.
    """
    for _ in range(fit.halvings):
        frame = resize_frame(frame, (frame.shape[1] // 2, frame.shape[0] // 2), "box")
    resized = resize_frame(frame, fit.resized, fit.interpolation)
    left, top = fit.crop
    if place is not None:
        left = int(place[0] * (fit.resized[0] - fit.bucket[0] + 1))
        top = int(place[1] * (fit.resized[1] - fit.bucket[1] + 1))
    if fit.resized == fit.bucket:
        return resized
    return np.ascontiguousarray(resized[top : top + fit.bucket[1], left : left + fit.bucket[0]])


def resize_frame(frame: Frame, size: Size, interpolation: str) -> Frame:
    """Resize a frame to exactly `size`, even if its aspect ratio changes.

    `interpolation` is "none" if the frame already has that size, a key of PILLOW_METHODS, or one of
    OPENCV_METHODS.
    """
    if interpolation == "none":
        return frame
    if interpolation in PILLOW_METHODS:
        # a copy: Pillow's is read-only
        return np.array(Image.fromarray(frame).resize(size, PILLOW_METHODS[interpolation]))
    method = OPENCV_METHODS[interpolation]
    return np.asarray(cv2.resize(frame, size, interpolation=method), dtype=np.uint8)


def resize_stretched(frame: Frame, size: Size) -> Frame:
    """Resize a frame to a size, without keeping its aspect ratio."""
    if (frame.shape[1], frame.shape[0]) == size:
        return frame
    return np.array(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))


def first_frame(path: Path, alpha: bool = False) -> Frame:
    """Read an image or a clip's first frame, H W 3; with `alpha`, H W 4 if it has transparency.

    Raises MediaError if the file cannot be read.
    """
    return next(video_frames(path, alpha)) if _plays(path) else read_image(path, alpha)


def frame_size(path: Path) -> Size:
    """Return (width, height) of an image or of a clip's frames.

    Raises:
        MediaError: If it cannot be read.
    """
    if not _plays(path):
        return image_size(path)
    info = video_info(path)
    return info.width, info.height


def _plays(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES


def video_frames(path: Path, alpha: bool = False, threads: int = 0) -> Iterator[Frame]:
    """Yield all frames (H W 3, upright, on white) in playing order, of a video file or a folder of images.

    With `alpha`, frames with transparency are H W 4 and keep the colors of transparent pixels. `threads` is
    the number of decoding threads; 0 lets FFmpeg choose.

    Raises:
        MediaError: If the file is missing, empty, without a video stream, not decodable, or truncated (an
            interrupted download).
    """
    if path.is_dir():
        yield from (read_image(image, alpha) for image in folder_images(path))
        return
    for frame, _, _ in timed_frames(path, alpha, threads):
        yield frame


def timed_frames(path: Path, alpha: bool = False, threads: int = 0) -> Iterator[tuple[Frame, float, float]]:
    """Yield all frames of a video file, upright, each with its start and end time in seconds.

    Frames are H W 3 on white; with `alpha`, frames with transparency are H W 4. `threads` is the number of
    decoding threads; 0 lets FFmpeg choose.
    """
    if decoding.is_animation(path):
        end = 0.0
        for pixels, seconds in decoding.animation_frames(path):
            yield pixels if alpha else blend_on_white(pixels), end, end + seconds
            end += seconds
        return
    with open_video(path) as (container, stream):
        default_seconds = 1 / float(stream.average_rate) if stream.average_rate else 0.0
        stream.codec_context.thread_count = threads
        for timed in decoding.decode_frames(path, container, stream):
            frame, start = timed.frame, timed.start
            seconds = float(frame.duration * stream.time_base) if frame.duration else default_seconds
            pixels = coded_pixels(decoding.frame_pixels(frame, stream, alpha=alpha), frame)
            width = decoding.square_width(frame, stream)
            if width != frame.width:
                pixels = resize_frame(pixels, (width, frame.height), "lanczos")
            if timed.orientation != decoding.AS_STORED:
                pixels = decoding.turn_upright(pixels, timed.orientation)
            yield pixels, start, start + seconds


class FrameSizes:
    """Records whether the frame size changes within a clip, as in rotated recordings and mixed folders."""

    def __init__(self) -> None:
        self.change: str | None = None  # "64x32, from frame 9 on 32x64": the first change

    def watch(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Yield the frames (H W C) unchanged, and record the first change of size."""
        first: Size | None = None
        for number, frame in enumerate(frames, 1):
            size = frame.shape[1], frame.shape[0]
            first = size if first is None else first
            if self.change is None and size != first:
                self.change = f"{first[0]}x{first[1]}, from frame {number} on {size[0]}x{size[1]}"
            yield frame


def frame_times(rate: float) -> Iterator[float]:
    """Yield the time in seconds of each frame of a clip at `rate`, endlessly."""
    return ((count + PLACE_IN_FRAME) / rate for count in itertools.count())


def frames_at(
    path: Path, seconds: Iterable[float], alpha: bool = False
) -> Iterator[tuple[Frame, int, float]]:
    """Yield (frame, its index, time) for the frame that a video file shows at each of the given times.

    `seconds` are ascending, counted from the first frame. Times after the end of the file are skipped, but at
    least one frame is yielded. Raises MediaError if the file cannot be decoded, or if a frame is shown longer
    than MAX_SHOWN_SECONDS.
    """
    times = iter(seconds)
    requested_time = next(times)
    first_start = 0.0
    shown_frame: Frame | None = None  # decoded last; shown from `shown_start` until the next frame starts
    shown_start = shown_end = 0.0
    index = -1
    has_yielded = False
    for frame, frame_start, frame_end in timed_frames(path, alpha):
        if shown_frame is None:
            first_start = frame_start
        while shown_frame is not None and requested_time < frame_start - first_start:
            _check_duration(path, frame_start - shown_start)
            yield shown_frame, index, requested_time
            has_yielded = True
            requested_time = next(times, math.inf)
        if requested_time == math.inf:
            return
        shown_frame = frame
        shown_start = frame_start
        shown_end = frame_end
        index += 1
    assert shown_frame is not None  # otherwise `timed_frames` raises
    _check_duration(path, shown_end - shown_start)
    while not has_yielded or requested_time < shown_end - first_start:
        yield shown_frame, index, requested_time
        has_yielded = True
        requested_time = next(times, math.inf)


def video_info(path: Path) -> VideoInfo:
    """Return size, number of frames, rate and duration of a video; one frame is decoded.

    A folder has the size of its first image.

    Raises:
        MediaError: If the video is missing, empty or cannot be decoded.
    """
    if path.is_dir():
        images = folder_images(path)
        width, height = image_size(images[0])
        return VideoInfo(width, height, len(images), None)
    if decoding.is_animation(path):
        durations = decoding.animation_durations(path)
        total_seconds = sum(durations)
        width, height = image_size(path)
        count = len(durations)
        return VideoInfo(width, height, count, fps=count / total_seconds, seconds=total_seconds)
    with open_video(path) as (container, stream):
        first, _, _ = decoding.first_image(path, container, stream)
        width = decoding.square_width(first, stream)
        height = first.height
        if decoding.is_sideways(first):
            width, height = height, width
        # headers may be wrong, but each frame takes at least a byte
        frames = stream.frames if 0 < stream.frames <= path.stat().st_size else None
        fps = float(stream.average_rate) if stream.average_rate else None
        if frames and fps:
            seconds = frames / fps
        else:
            seconds = container.duration / 1_000_000 if container.duration else None
        return VideoInfo(width, height, frames, fps=fps, seconds=seconds)


def had_other_orientation(path: Path) -> bool:
    """Return whether earlier versions of this program oriented a clip differently when they read it.

    They used only the angle of the display matrix, so mirrored clips differ. They read clips with
    transparency as stored. One frame is decoded.

    Raises:
        MediaError: If the clip cannot be read.
    """
    if path.suffix.lower() not in VIDEO_SUFFIXES or path.is_dir():
        return False
    with open_video(path) as (container, stream):
        first, _, _ = decoding.first_image(path, container, stream)
        orientation = decoding.read_orientation(first)
        return orientation.is_mirrored or (decoding.hides_alpha(stream) and orientation != decoding.AS_STORED)


def count_frames(path: Path, threads: int = 0) -> int:
    """Return the frame count from the header, else by decoding all frames.

    Raises MediaError if the file cannot be read.
    """
    return video_info(path).frames or sum(1 for _ in video_frames(path, threads=threads))


def folder_images(folder: Path) -> list[Path]:
    """Return the images of a folder that is read as a video, sorted by the numbers in their names.

    Raises:
        MediaError: If the folder has no images.
    """
    images = sort_by_numbers(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in image_suffixes() and not path.name.startswith(".")
    )
    if not images:
        raise MediaError(f"{folder} is a folder without images")
    return images


def reordered_images(folder: Path) -> tuple[Path, Path] | None:
    """Return two neighboring images of a folder whose order would change if names were sorted as plain text.

    The result is None if sorting by numbers and sorting as text give the same order.

    Raises:
        MediaError: If the folder has no images.
    """
    for earlier, later in itertools.pairwise(folder_images(folder)):
        if earlier.name > later.name:
            return earlier, later
    return None


def _check_duration(path: Path, seconds: float) -> None:
    if seconds > MAX_SHOWN_SECONDS:
        raise MediaError(
            f"{path} shows one frame for {seconds:.0f} s, at most {MAX_SHOWN_SECONDS:.0f} s are played. Its "
            "times are damaged, or it is a slide show: cut it, or convert it to a constant frame rate."
        )


# Text metadata of images and videos.
logger = logging.getLogger(__name__)

# metadata of cameras and editors that may contain a thumbnail as text, and similar entries
_IMAGE_TAG_NAME = re.compile(r"xmp|exif|raw profile|thumb|coverart|metadata_block_picture", re.IGNORECASE)
# numbered processing steps of a finished file; mkv stores names in upper case
TOOL_TAG = re.compile(r"post_(\d{1,6})", re.IGNORECASE)
_CODED = re.compile(r"(?:[A-Za-z0-9+/=_-]{40,}\s){9}|[A-Za-z0-9+/=_-]{400}")


def read_tags(path: Path) -> dict[str, str]:
    """Return the text metadata of a PNG, a video or a WAV file, by name; {} if there is none.

    Keys of videos are lower case, because mkv stores them in upper case. The comment of a WAV file is read as
    a JSON table of further tags.

    Raises:
        MediaError: If the file cannot be read.
    """
    if path.suffix.lower() in image_suffixes():
        with open_image(path) as image:
            return {str(name): str(value) for name, value in getattr(image, "text", {}).items()}
    if path.suffix.lower() == ".wav":
        with reading(path), open_container(path, AUDIO_FORMATS) as container:
            tags = dict(container.metadata)
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            tags |= {str(key): str(text) for key, text in dict(json.loads(tags.get("comment", ""))).items()}
            del tags["comment"]
        return tags
    with open_video(path) as (container, _):
        return {name.lower(): value for name, value in container.metadata.items()}


def without_images(path: Path, tags: Mapping[str, str]) -> dict[str, str]:
    """Drop tags that may contain an image, such as XMP with its thumbnails, and log their names.

    `path` is the file with the tags, for the log.
    """
    left_out = [
        name
        for name, text in tags.items()
        if _IMAGE_TAG_NAME.search(name) or len(text) > MAX_TAG_CHARACTERS or _CODED.search(text)
    ]
    if left_out:
        logger.warning("%s: left out, because it may contain an image: %s", path, ", ".join(left_out))
    return {name: text for name, text in tags.items() if name not in left_out}


TRIES = 3


def pick_frames(
    path: Path,
    choose_indices: Callable[[int], Collection[int]],
    reduce: Callable[[Frame], Frame],
    threads: int = 0,
    exact: bool = True,
) -> list[Frame]:
    """Return selected frames of a clip; the clip is read to its end, which reveals damage.

    If the header's number of frames proves wrong, the selection is repeated with the real number; without
    `exact`, only if a selected frame is missing.

    Args:
        path: The clip.
        choose_indices: Takes the number of frames and returns the indices to select.
        reduce: Applied to each selected frame.
        threads: Number of decoding threads; 0 lets FFmpeg choose.
        exact: Whether the selection must be made with the real number of frames.

    Raises:
        MediaError: If the clip cannot be read.
    """
    expected_count = count_frames(path, threads)
    for _ in range(TRIES):
        chosen_indices = choose_indices(expected_count)
        count = 0
        frames = []
        for index, frame in enumerate(video_frames(path, threads=threads)):
            count = index + 1
            if index in chosen_indices:
                frames.append(reduce(frame))
        if count == expected_count or (not exact and len(frames) == len(chosen_indices)):
            return frames
        expected_count = count
    raise MediaError(f"{path} has a different number of frames each time it is read. Is it being written?")
