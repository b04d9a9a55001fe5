"""Encode images to a video stream. All videos are written with this encoder.

It numbers the images; its output does not depend on their times. Packets get their times afterwards.
"""

import contextlib
import errno
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from logging import getLogger
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from modules.errors import MediaError
from modules.media.decoding import is_sideways
from modules.media.opening import av, open_container

logger = getLogger(__name__)

# tags with standard fields in MP4; all others need `use_metadata_tags`
_MP4_TAGS = frozenset((
    "title", "artist", "album_artist", "composer", "album", "date", "comment", "genre", "copyright",
    "grouping", "lyrics", "description", "synopsis", "show", "episode_id", "network", "keywords",
    "creation_time",
))  # fmt: skip


# Pixels of 8 and of 16 bits a channel. FFmpeg's own conversions are off by up to 3 of 255, or add noise.
Pixels = NDArray[np.uint8] | NDArray[np.uint16]  # H W 3, RGB; 16 bits use their whole range


@dataclass(frozen=True)
class OutputFrame:
    """A frame, and when and how long it is shown, in exact seconds so that rounding errors do not add up."""

    pixels: Pixels
    start: Fraction
    seconds: Fraction


def in_eight_bits(pixels: Pixels) -> NDArray[np.uint8]:
    """Convert pixels to 8 bits; 16-bit values are divided by 257 and rounded."""
    if pixels.dtype == np.uint8:
        return np.asarray(pixels, dtype=np.uint8)
    return np.asarray(cv2.convertScaleAbs(pixels, alpha=1 / 257), dtype=np.uint8)


def in_sixteen_bits(pixels: Pixels) -> NDArray[np.uint16]:
    """Convert pixels to 16 bits; 8-bit values are multiplied by 257, so that white stays white."""
    if pixels.dtype == np.uint16:
        return np.asarray(pixels, dtype=np.uint16)
    return pixels.astype(np.uint16) * np.uint16(257)


@dataclass(frozen=True)
class Codec:
    """Settings for encoding videos with one codec."""

    encoder: str
    pixel_format: str
    options: Mapping[str, str]
    has_crf: bool  # whether it has the options crf and preset
    suffixes: tuple[str, ...]
    threads: int = 0  # threads; 0: one per core, if that does not change the bytes


# One lookahead thread, because several divide images and analyze each part alone. With AVX-512, x264's
# macroblock tree also adds uninitialized lanes after the end of a row: equal images would become
# different files. Whatever has AVX-512 has AVX2; without the tree files are much larger (docs/decisions.md)
_AVX512F = 13  # CV_CPU_AVX_512F, which OpenCV defines only in C++
X264 = {"x264-params": "lookahead-threads=1" + (":asm=avx2" if cv2.checkHardwareSupport(_AVX512F) else "")}
# A fixed number of threads: with one per core, the result depends on the machine
_CODECS = {
    "h264": Codec(
        encoder="libx264",
        pixel_format="yuv420p",
        options=X264,
        has_crf=True,
        suffixes=(".mp4", ".mkv", ".mov"),
        threads=6,
    ),
    "h265": Codec(
        encoder="libx265",
        pixel_format="yuv420p",
        options={"x265-params": "log-level=error"},
        has_crf=True,
        suffixes=(".mp4", ".mkv", ".mov"),
        threads=3,
    ),
    "prores": Codec(
        encoder="prores_ks",
        pixel_format="yuv422p10le",
        options={"profile": "3"},
        has_crf=False,
        suffixes=(".mkv", ".mov"),
    ),
}
LONE_COLUMN = 64  # pixels; with one column of blocks, libx265 is not deterministic

# width, height: with 40 x 64, 48 x 48 or 48 x 32 pixels libx265 damages memory, which at times ends the
# process; from 64 x 40 on it did not in many trials
SMALLEST_H265 = (64, 48)
MUXERS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov"}


def _is_too_small_for_h265(width: int, height: int) -> bool:
    return width // 2 * 2 < SMALLEST_H265[0] or height // 2 * 2 < SMALLEST_H265[1]


def resolve_codec(codec: str, width: int, height: int) -> str:
    """Return `codec`, or h264 with a warning if images are too small for an h265 encoder."""
    if codec != "h265" or not _is_too_small_for_h265(width, height):
        return codec
    logger.warning(
        "--codec h265 is written as h264 because %d x %d pixels are too few for its encoder", width, height
    )
    return "h264"


def select_codec(path: Path, codec: str) -> Codec:
    """Return the codec with the given name.

    Raises:
        MediaError: If files with the suffix of `path` do not support the codec.
    """
    kind = _CODECS[codec]
    suffix = path.suffix.lower()
    if suffix not in kind.suffixes:
        raise MediaError(
            f"{path}: {codec} can be written to {', '.join(kind.suffixes)}, not to "
            f"{suffix or 'a name without suffix'}"
        )
    return kind


def check_image(path: Path, codec: str, first: Pixels) -> None:
    """Raise MediaError if images of the first one's size are too small for the codec."""
    height, width = first.shape[:2]
    if min(height, width) < 2:
        raise MediaError(f"{path}: {width} x {height} pixels are too few for a video, 2 x 2 is the minimum")
    if codec == "h265" and _is_too_small_for_h265(width, height):
        raise MediaError(
            f"{path}: {codec} cannot be used for {width} x {height} pixels, {SMALLEST_H265[0]} x "
            f"{SMALLEST_H265[1]} is the minimum. Use h264"
        )


def create_container(
    path: Path, suffix: str, tags: Mapping[str, str] | None, options: Mapping[str, str] | None = None
) -> Any:
    """Open a video file for writing, with tags and without random ids.

    `options` are further options of FFmpeg's muxer.
    """
    options = {"fflags": "+bitexact", **(options or {})}
    container = av.open(f"file:{path}", "w", format=MUXERS[suffix], options=options)
    container.metadata.update(tags or {})
    return container


def add_video_stream(
    container: Any,
    kind: Codec,
    first: Pixels,
    rate: Fraction,
    *,
    crf: int,
    preset: str,
    bit_rate: int | None = None,
) -> Any:
    """Add a stream for frames of the size of `first`; `rate` is the number of frames per second.

    `crf` is the quality; `bit_rate`, in bits per second, replaces it.

    Raises:
        MediaError: If FFmpeg lacks the encoder.
    """
    try:
        stream = container.add_stream(kind.encoder, rate=rate)
    except ValueError:
        raise MediaError(f"FFmpeg here lacks the encoder {kind.encoder}: choose another codec") from None
    # most pixel formats need even sides
    stream.height, stream.width = (side // 2 * 2 for side in first.shape[:2])
    stream.pix_fmt = kind.pixel_format
    stream.options = dict(kind.options)
    context = stream.codec_context
    colors = av.video.reformatter
    context.colorspace = context.color_primaries = context.color_trc = colors.Colorspace.ITU709.value
    context.color_range = colors.ColorRange.MPEG.value
    if kind.encoder == "libx265" and container.format.name in ("mp4", "mov"):
        context.codec_tag = "hvc1"  # common players require it
    context.thread_type, context.thread_count = "FRAME", kind.threads
    if kind.encoder == "libx265" and stream.width <= LONE_COLUMN:
        stream.options["x265-params"] += ":ctu=32"  # smaller blocks, so that there are two columns
    if bit_rate is not None:
        stream.bit_rate = bit_rate
    elif kind.has_crf:
        stream.options = {**stream.options, "crf": str(crf)}
    if kind.has_crf:
        stream.options = {**stream.options, "preset": preset}
    return stream


def encode_images(stream: Any, pictures: Iterable[Pixels]) -> Iterator[Any]:
    """Encode frames and yield packets whose times are the indices of the frames, in units of 1 / rate.

    An odd last row or column is cropped.

    Raises:
        MediaError: If the encoder fails.
    """
    frames = _make_frames(stream, pictures)
    for frame in itertools.chain(frames, [None]):  # None returns the packets that the encoder has held back
        try:
            packets = stream.encode(frame)
        except av.FFmpegError as error:
            raise MediaError(
                f"the encoder {stream.codec_context.name} fails at {stream.width} x {stream.height} pixels: "
                f"{error.strerror}. Choose another codec."
            ) from error
        yield from packets


def _make_frames(stream: Any, pictures: Iterable[Pixels]) -> Iterator[Any]:
    """Yield FFmpeg's frames of the images, in the stream's pixel format and with BT.709 colors."""
    colors = av.video.reformatter
    bt709 = colors.Colorspace.ITU709.value
    is_deep = any(part.bits > 8 for part in av.VideoFormat(stream.pix_fmt).components)
    for index, pixels in enumerate(pictures):
        height, width, _ = pixels.shape
        if height // 2 * 2 != stream.height or width // 2 * 2 != stream.width:
            raise MediaError(
                f"the images of a video change their size: image {index + 1} has {width} x "
                f"{height} pixels, those before it {stream.width} x {stream.height}"
            )
        even_sized: Any = np.ascontiguousarray(pixels[: stream.height, : stream.width])
        rgb: Any = in_sixteen_bits(even_sized) if is_deep else in_eight_bits(even_sized)
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb48le" if is_deep else "rgb24")
        converted = frame.reformat(
            format=stream.pix_fmt,
            dst_colorspace=colors.Colorspace.ITU709,
            dst_color_range=colors.ColorRange.MPEG,
            threads=1,  # swscale with several threads sometimes corrupts rows
        )
        converted.pts = index
        converted.time_base = 1 / stream.codec_context.framerate
        # ProRes reads the colors from the frames
        converted.colorspace = converted.color_primaries = converted.color_trc = bt709
        del even_sized, rgb, frame  # free memory before encoding
        yield converted


def recompress(frame: NDArray[np.uint8], crf: int) -> NDArray[np.uint8]:
    """Encode and decode a frame, H W 3, with H.264 of quality `crf`; an odd last row or column is cropped.

    A single thread encodes: several threads would divide the frame into slices, so that pixels would depend
    on the number of cores.
    """
    height, width = (side // 2 * 2 for side in frame.shape[:2])
    decoder: Any = av.CodecContext.create("h264", "r")
    encoder: Any = av.CodecContext.create("libx264", "w")
    encoder.width = width
    encoder.height = height
    encoder.pix_fmt = "yuv420p"
    encoder.time_base = Fraction(1)
    encoder.thread_count = 1
    encoder.options = {**X264, "crf": str(crf), "preset": "veryfast"}
    even_sized: Any = np.ascontiguousarray(frame[:height, :width])
    image = av.VideoFrame.from_ndarray(even_sized, format="rgb24").reformat(format="yuv420p", threads=1)
    packets = [*encoder.encode(image), *encoder.encode(), None]  # None flushes the decoder
    (decoded_frame,) = [decoded for packet in packets for decoded in decoder.decode(packet)]
    return np.asarray(decoded_frame.reformat(format="rgb24", threads=1).to_ndarray())


@contextlib.contextmanager
def name_write_errors() -> Iterator[None]:
    """Convert FFmpeg's errors to OSError, which `atomic_path` explains."""
    try:
        yield
    except av.FFmpegError as error:
        number = error.errno if error.errno in errno.errorcode else errno.EIO
        raise OSError(number, error.strerror) from error


def copy_pixel_aspect(path: Path, source: Any, video: Any) -> None:
    """Copy the pixel aspect ratio, which may not be 1 (as on DVDs), to a new video.

    `source` is the video stream of the file at `path`, and `video` is the new file's stream.
    """
    ratio = source.sample_aspect_ratio
    if not ratio or ratio == 1:
        return
    with open_container(path) as again, contextlib.suppress(av.FFmpegError):
        first = next(again.decode(again.streams[source.index]))
        video.codec_context.sample_aspect_ratio = 1 / ratio if is_sideways(first) else ratio


def needs_own_tags(tags: Iterable[str]) -> bool:
    """Return whether any tag is not a standard MP4 tag."""
    return any(name.lower() not in _MP4_TAGS for name in tags)
