"""Write uint8 frames to image and video files, and join videos without encoding them again."""

import contextlib
import errno
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, PngImagePlugin

from modules.atomic_write import atomic_path
from modules.errors import MediaError
from modules.media.opening import file_url, open_container, open_video
from modules.media.reading import Frame


def write_png(path: Path, frame: Frame, text: Mapping[str, str] | None = None) -> None:
    """Write one frame (H W 3 or H W 4) as PNG, with text chunks in UTF-8, completely or not at all.

    Raises OutputError if the file cannot be written.
    """
    chunks = PngImagePlugin.PngInfo()
    for name, value in (text or {}).items():
        # a plain text chunk is Latin-1, iTXt is UTF-8
        add = chunks.add_text if value.isascii() else chunks.add_itxt
        add(name, value)
    with atomic_path(path, frame.nbytes) as temporary:
        Image.fromarray(frame).save(temporary, format="PNG", pnginfo=chunks)


@dataclass(frozen=True)
class _Codec:
    encoder: str
    pixel_format: str
    options: Mapping[str, str]
    has_crf: bool  # whether it has the options crf and preset
    suffixes: tuple[str, ...]


_CODECS = {
    "h264": _Codec("libx264", "yuv420p", {}, True, (".mp4", ".mkv", ".mov")),
    "h265": _Codec("libx265", "yuv420p", {"x265-params": "log-level=error"}, True, (".mp4", ".mkv", ".mov")),
    "prores": _Codec("prores_ks", "yuv422p10le", {"profile": "3"}, False, (".mkv", ".mov")),
}

# width, height: with 40 x 64, 48 x 48 or 48 x 32 pixels libx265 damages memory, which at times ends the
# process; from 64 x 40 on it did not in many trials
SMALLEST_H265 = (64, 48)
_MUXERS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov"}


def encoder_for(codec: str, frame: Frame) -> str:
    """Return the codec to use for frames of this size (H W 3): h264 in place of h265 for tiny ones."""
    height, width = (side // 2 * 2 for side in frame.shape[:2])
    is_tiny = width < SMALLEST_H265[0] or height < SMALLEST_H265[1]
    return "h264" if codec == "h265" and is_tiny else codec


def write_video(
    path: Path,
    frames: Iterable[Frame],
    fps: float,
    codec: str = "h264",
    crf: int = 12,
    preset: str = "slow",
    bit_rate: int | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Encode frames (H W 3, read one at a time) to `path` (.mp4, .mkv or .mov), completely or not at all.

    codec: h264, h265 (yuv420p) or prores (.mkv, .mov; 10 bit). bit_rate: bits per second instead of crf.
    tags: text to store by name; .mkv shows names in upper case. The last row or column of an odd size is
    cropped. Colours are BT.709 and tagged so. No time and no random id is written.
    Raises MediaError if there is no frame, the codec does not fit the suffix, or the frames are too small for
    it; OutputError if the file cannot be written.
    """
    kind = _CODECS[codec]
    suffix = path.suffix.lower()
    if suffix not in kind.suffixes:
        raise MediaError(
            f"{path}: {codec} can be written to {', '.join(kind.suffixes)}, not to "
            f"{suffix or 'a name without suffix'}"
        )
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise MediaError(f"{path}: there is no frame to write")
    if encoder_for(codec, first) != codec:
        height, width = first.shape[:2]
        raise MediaError(
            f"{path}: {codec} cannot be used for {width} x {height} pixels, {SMALLEST_H265[0]} x "
            f"{SMALLEST_H265[1]} are the least. Use h264"
        )
    with atomic_path(path) as temporary, name_write_errors():
        # no random ids
        container = _create(temporary, suffix, tags)
        with container:
            stream = _add_stream(container, kind, first, fps)
            if bit_rate is not None:
                stream.bit_rate = bit_rate
            elif kind.has_crf:
                stream.options = {**stream.options, "crf": str(crf)}
            if kind.has_crf:
                stream.options = {**stream.options, "preset": preset}
            for index, frame in enumerate(itertools.chain([first], remaining)):
                container.mux(stream.encode(_video_frame(frame, stream, index)))
            container.mux(stream.encode())


def _create(path: Path, suffix: str, tags: Mapping[str, str] | None) -> Any:
    """Open a file to write, without random ids and with tags."""
    options = {"fflags": "+bitexact"}
    if tags and suffix != ".mkv":
        options["movflags"] = "use_metadata_tags"  # else only names known to the format are stored
    container = av.open(file_url(path), "w", format=_MUXERS[suffix], options=options)
    container.metadata.update(tags or {})
    return container


def _add_stream(container: Any, kind: _Codec, first: Frame, fps: float) -> Any:
    stream = container.add_stream(kind.encoder, rate=_rate(fps))
    stream.height, stream.width = (side // 2 * 2 for side in first.shape[:2])
    stream.pix_fmt = kind.pixel_format
    stream.options = dict(kind.options)
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = Colorspace.ITU709.value
    context.color_range = ColorRange.MPEG.value
    return stream


def _video_frame(frame: Frame, stream: Any, index: int) -> av.VideoFrame:
    even = np.ascontiguousarray(frame[: stream.height, : stream.width])
    converted = av.VideoFrame.from_ndarray(even, format="rgb24").reformat(
        format=stream.pix_fmt, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )
    converted.pts = index
    converted.time_base = 1 / stream.codec_context.framerate
    return converted


@dataclass(frozen=True)
class Segment:
    """A video written by `write_video`, to be joined with others of the same size, rate and settings."""

    path: Path
    frames: int
    # by how many frames decoding order is ahead of display order: frames that refer to later ones are stored
    # after them
    lead: int


def measure_segment(path: Path, fps: float) -> Segment:
    """Measure a finished file. Raises MediaError if it cannot be read."""
    with open_video(path) as (container, _):
        places = [_place(packet, fps) for packet in _packets(container)]
    return Segment(path, len(places), max(order - place for order, place in enumerate(places)))


def join_videos(
    path: Path, segments: Sequence[Segment], fps: float, tags: Mapping[str, str] | None = None
) -> None:
    """Concatenate segments to one video (.mp4), completely or not at all. tags: as of `write_video`.

    Pictures are copied, not encoded again. A player that has an earlier file of that name open continues with
    the earlier one. Raises MediaError if the segments' settings differ, OutputError if the file cannot be
    written.
    """
    lead = max(segment.lead for segment in segments)
    with atomic_path(path) as temporary, name_write_errors():
        target = _create(temporary, ".mp4", tags)
        with target:
            stream: Any = None
            settings, frames, order = b"", 0, 0
            for segment in segments:
                with open_container(segment.path) as source:
                    original = source.streams.video[0]
                    if stream is None:
                        stream = target.add_stream_from_template(original, opaque=True)
                        stream.time_base = 1 / _rate(fps)
                        settings = bytes(original.codec_context.extradata or b"")
                    if bytes(original.codec_context.extradata or b"") != settings:
                        raise MediaError(
                            f"{segment.path} and {segments[0].path} were encoded with different settings: "
                            "they cannot be joined"
                        )
                    for packet in _packets(source):
                        shown = frames + _place(packet, fps)
                        packet.time_base, packet.duration = 1 / _rate(fps), 1
                        # in storage order, never later than the display time
                        packet.pts, packet.dts = shown, order - lead
                        packet.stream = stream
                        target.mux(packet)
                        order += 1
                frames += segment.frames


def _packets(container: Any) -> Iterator[Any]:
    """Yield the stored pictures in storage order."""
    for packet in container.demux(container.streams.video[0]):
        if packet.size:  # the last packet is empty
            yield packet


def _place(packet: Any, fps: float) -> int:
    """Return the index of the frame that a stored picture is."""
    return round(packet.pts * packet.time_base * _rate(fps))


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


@contextlib.contextmanager
def name_write_errors() -> Iterator[None]:
    """Turn FFmpeg's errors into OSError, which `atomic_path` explains."""
    try:
        yield
    except av.FFmpegError as error:
        number = error.errno if error.errno in errno.errorcode else errno.EIO
        raise OSError(number, error.strerror) from error
