"""Decode a video file or an animation frame by frame, and detect truncated files."""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from modules.console import format_count
from modules.errors import MediaError
from modules.limits import MAX_PIXELS
from modules.media.colors import blend_on_white, shown_pixels
from modules.media.opening import av, has_large_frames, open_image, open_video, reading, reject_cut

# codec -> decoder that reads transparency, unlike FFmpeg's default one
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
MAX_RATIO = 4  # maximum aspect ratio of a pixel; files with more are damaged
NEARLY_SQUARE = 0.005  # smaller differences of the ratio from 1 are rounding errors
_DISPLAY_MATRIX = "DISPLAYMATRIX"  # PyAV's name of the display matrix in a frame's side data
TAIL = 64  # bytes; download programs may fill a file with zeros first


@dataclass(frozen=True)
class Orientation:
    """How to turn a stored frame upright: transpose first, then mirror."""

    is_transposed: bool = False  # rows become columns
    flips_columns: bool = False  # mirror left and right
    flips_rows: bool = False  # mirror top and bottom

    @property
    def is_mirrored(self) -> bool:
        """Whether displaying the stored frame mirrors it, so that rotation alone is not enough."""
        return self.is_transposed ^ self.flips_columns ^ self.flips_rows


AS_STORED = Orientation()


# value of EXIF's orientation, which animated WebPs may have -> orientation
EXIF_ORIENTATION = 0x0112
_BY_EXIF = {
    2: Orientation(flips_columns=True),
    3: Orientation(flips_columns=True, flips_rows=True),
    4: Orientation(flips_rows=True),
    5: Orientation(is_transposed=True),
    6: Orientation(is_transposed=True, flips_columns=True),
    7: Orientation(is_transposed=True, flips_columns=True, flips_rows=True),
    8: Orientation(is_transposed=True, flips_rows=True),
}


def read_orientation(frame: Any) -> Orientation:
    """Return the orientation that a decoded frame's display matrix describes.

    An angle between quarter turns is rounded to the nearest of the eight orientations, and scaling is
    ignored. Source: FFmpeg's libavutil/display.h.
    """
    # `frame.side_data` would form a reference cycle with the frame, so that hundreds of frames would stay in
    # memory until the garbage collector runs
    side_data: Any = av.sidedata.sidedata
    stored = side_data.SideDataContainer(frame).get(_DISPLAY_MATRIX)
    if stored is None:
        return AS_STORED
    # a pixel at column x and row y is shown at column a * x + c * y, row b * x + d * y
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(stored)[:36])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, flips_columns=a < 0, flips_rows=d < 0)
    return Orientation(True, flips_columns=c < 0, flips_rows=b < 0)  # True: rows become columns


@dataclass(frozen=True, slots=True)
class TimedFrame:
    """A frame decoded by FFmpeg, the time in seconds at which it is shown, and its orientation."""

    frame: Any
    start: float
    orientation: Orientation


def decode_frames(path: Path, container: Any, stream: Any) -> Iterator[TimedFrame]:
    """Yield the frames of a video in playing order, each with its time and orientation.

    `container` and `stream` come from `open_video(path)`.

    Raises:
        MediaError: If the file is damaged, ends before its stated length, or has no frame.
    """
    # large frames are divided among threads, because a frame per thread would take too much memory
    stream.thread_type = "SLICE" if has_large_frames(stream.codec_context) else "AUTO"
    alpha_decoder: Any = None  # replaces the default decoder, if that drops the transparency
    orientation = AS_STORED
    if hides_alpha(stream):
        alpha_decoder = _open_alpha_decoder(path, stream.codec_context.name)
        orientation = _read_first_orientation(path)
    default_seconds = 1 / float(stream.average_rate) if stream.average_rate else 0.0
    num_frames = 0
    last_start = 0.0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise MediaError(
                f"{path} is damaged or cut short: only {format_count(num_frames, 'frame')} could be read"
            )
        if alpha_decoder is None:
            frames = packet.decode()
        else:
            frames = alpha_decoder.decode(packet if packet.size else None)  # None flushes the decoder
        for frame in frames:
            num_frames += 1
            start = last_start + default_seconds
            if frame.pts is not None:
                start = float(frame.pts * (frame.time_base or stream.time_base))
            last_start = max(last_start, start)
            if alpha_decoder is None:
                orientation = read_orientation(frame)
            yield TimedFrame(frame, start, orientation)
    if not num_frames:
        reject_cut(path)
        raise _no_frames(path)
    _check_end(path, container, stream, num_frames, last_start)


def _check_end(path: Path, container: Any, stream: Any, num_frames: int, last_start: float) -> None:
    """Raise MediaError if the last frame is shown long before the end that a Matroska file states."""
    # Most demuxers report a truncated file themselves; Matroska's does not, but each stream has its duration
    # as a tag.
    end = declared_end(container, stream)
    default_seconds = 1 / float(stream.average_rate) if stream.average_rate else 0.1
    tolerance = max(4 * default_seconds, 0.3)
    # a complete file may show its last frame for long
    if end is not None and last_start + tolerance < end and not _has_all_bytes(path):
        raise MediaError(
            f"{path} is cut short: it should last {float(end):.2f} s, the last of {num_frames} frames is "
            f"at {last_start:.2f} s"
        )


def _open_alpha_decoder(path: Path, codec: str) -> Any:
    """Return a decoder that reads the alpha channel of this codec."""
    try:
        decoder = av.CodecContext.create(_ALPHA_DECODERS[codec], "r")
    except ValueError:
        raise MediaError(
            f"{path} has transparency in {codec}, for which FFmpeg here lacks {_ALPHA_DECODERS[codec]}. "
            "Convert it to ProRes 4444, or to a folder of PNG images."
        ) from None
    decoder.options = {"max_pixels": str(MAX_PIXELS)}  # `open_video` has checked the size of its frames
    return decoder


def _read_first_orientation(path: Path) -> Orientation:
    """Return how a video's first frame is rotated and mirrored, which the alpha decoder does not report."""
    with open_video(path) as (container, stream):
        first, _, _ = first_image(path, container, stream)
        return read_orientation(first)


def _has_all_bytes(path: Path) -> bool:
    """Return whether a Matroska file has its declared size and does not end in zeros (unfinished)."""
    declared = _read_matroska_size(path)
    if not 0 < declared <= path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(max(declared - TAIL, 0))
        return any(file.read(TAIL))


def hides_alpha(stream: Any) -> bool:
    """Return whether a stream has an alpha channel that FFmpeg's default decoder ignores."""
    return stream.codec_context.name in _ALPHA_DECODERS and stream.metadata.get("alpha_mode") == "1"


Turned = TypeVar("Turned", bound=NDArray[Any])


def has_alpha(frame: Any) -> bool:
    """Return whether a frame decoded by FFmpeg has an alpha channel."""
    return any(part.is_alpha for part in frame.format.components)


def frame_pixels(frame: Any, stream: Any, deep: bool = False, alpha: bool = False) -> NDArray[Any]:
    """Return the pixels of a decoded frame, H W 3 on white; with `alpha`, H W 4 if it has an alpha channel.

    With `deep`, they have 16 bits per channel, otherwise 8.
    """
    rgb_format, rgba_format = ("rgb48le", "rgba64le") if deep else ("rgb24", "rgba")
    # swscale converts in one thread, because with several threads it sometimes corrupts rows
    if has_alpha(frame) and alpha:
        with_alpha: NDArray[Any] = frame.to_ndarray(format=rgba_format, threads=1)
        return with_alpha
    pixels: NDArray[Any] = frame.to_ndarray(format=rgb_format, threads=1)
    # the fourth byte of raw pixels in AVI is usually unused, not alpha
    is_raw_avi = stream.codec_context.name == "rawvideo" and stream.container.format.name == "avi"
    if not has_alpha(frame) or is_raw_avi:
        return pixels
    opacity = frame.to_ndarray(format=rgba_format, threads=1)[..., 3:]
    is_opaque = opacity.min() == np.iinfo(opacity.dtype).max
    return pixels if is_opaque else blend_on_white(np.dstack([pixels, opacity]))


def check_size(path: Path, container: Any, stream: Any) -> None:
    """Raise MediaError if a file is shorter than its header says, before hours of work go into it.

    Other missing parts are found by `decode_frames` at the end of decoding.
    """
    size = path.stat().st_size
    declared = 0
    if "matroska" in container.format.name:
        declared = _read_matroska_size(path)
    elif "mov" in container.format.name:
        index_entries = stream.index_entries  # places of the packets in the file
        declared = index_entries[-1].pos + index_entries[-1].size if len(index_entries) else 0
    if declared > size:
        raise MediaError(
            f"{path} is cut short: it has {size:,} bytes of at least {declared:,}. Download it again."
        )


def _read_matroska_size(path: Path) -> int:
    """Return the file size that a Matroska header states, or 0. Source: RFC 9559, EBML."""
    with path.open("rb") as file:
        for _ in range(2):  # the header of EBML, and the segment
            element_id = file.read(4)
            first_byte = file.read(1)
            if len(element_id) < 4 or not first_byte or not first_byte[0]:
                return 0
            # the leading zero bits of a size tell its length in bytes; 7 bits of each byte contain the value
            length = 9 - first_byte[0].bit_length()
            size_field = first_byte + file.read(length - 1)
            all_ones = (1 << 7 * length) - 1
            size = int.from_bytes(size_field, "big") & all_ones
            if element_id == b"\x18\x53\x80\x67":  # the segment
                is_unknown = size == all_ones  # still being written, or a stream
                return 0 if is_unknown else file.tell() + size
            file.seek(size, 1)
    return 0


def declared_end(container: Any, stream: Any) -> Fraction | None:
    """Return when a stream of a Matroska file ends, in seconds, according to its tags; None without them."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if "matroska" not in container.format.name or match is None:
        return None
    return int(match[1]) * 3600 + int(match[2]) * 60 + Fraction(match[3])


def first_image(path: Path, container: Any, stream: Any) -> tuple[Any, int, int]:
    """Return the first frame decoded by FFmpeg, and the width and height of its upright image.

    Raises MediaError if there is no frame.
    """
    first = next(container.decode(stream), None)
    if first is None:
        reject_cut(path)
        raise _no_frames(path)
    return (first, first.height, first.width) if is_sideways(first) else (first, first.width, first.height)


def is_sideways(frame: Any) -> bool:
    """Return whether a frame is rotated by a quarter turn for display, which exchanges width and height."""
    return read_orientation(frame).is_transposed


def square_width(frame: Any, stream: Any) -> int:
    """Return the width of a stored frame after scaling it to square pixels; the height does not change."""
    ratio = stream.sample_aspect_ratio
    if not ratio or not 1 / MAX_RATIO <= ratio <= MAX_RATIO or abs(ratio - 1) < NEARLY_SQUARE:
        return int(frame.width)
    return round(frame.width * ratio)


def _no_frames(path: Path) -> MediaError:
    return MediaError(f"no frames in {path}: it contains none that can be decoded")


def turn_upright(pixels: Turned, orientation: Orientation) -> Turned:
    """Rotate and mirror a frame's pixels, H W C, as a player shows them."""
    if orientation == AS_STORED:
        return pixels
    view: Any = pixels.swapaxes(0, 1) if orientation.is_transposed else pixels
    if orientation.flips_columns:
        view = view[:, ::-1]
    if orientation.flips_rows:
        view = view[::-1]
    upright: Any = np.ascontiguousarray(view)
    return upright


def time_origin(container: Any) -> Fraction:
    """Return the time in seconds at which a file begins to play, in its own timeline; not always 0.

    Recordings of broadcasts begin at any time, cut files where they were cut.
    """
    if not container.start_time:  # start time in rounded microseconds
        return Fraction(0)
    rounded = Fraction(container.start_time, 1_000_000)
    exact = [
        stream.start_time * stream.time_base
        for stream in container.streams
        if stream.type in ("audio", "video") and stream.start_time is not None
    ]
    return min((time for time in exact if abs(time - rounded) < Fraction(2, 1_000_000)), default=rounded)


# Read animated GIF and WebP files: frames with transparency, and how long each one is shown.
#
# Frame counts and durations come from the block headers, without decoding; Pillow decodes and applies the
# disposal of frames. Every failure is a MediaError with the file and the reason.
ANIMATION_SUFFIXES = frozenset({".gif", ".webp"})
SHORTEST = 0.011  # seconds; browsers show shorter frames for DEFAULT instead
DEFAULT = 0.1
_CUT = "is damaged or cut short: it ends before its last frame does"


def is_animation(path: Path) -> bool:
    """Return whether a file with the suffix of a GIF or WebP has more than one frame.

    Only block headers are read, and no more than necessary.

    Raises:
        MediaError: If the headers are damaged or end early.
    """
    return (
        path.suffix.lower() in ANIMATION_SUFFIXES
        and path.is_file()
        and len(_read_durations(path, maximum=2)) > 1
    )


def animation_durations(path: Path) -> tuple[float, ...]:
    """Return how long each frame of an animation is shown, in seconds.

    Raises:
        MediaError: If the file is damaged or cut short.
    """
    return tuple(_read_durations(path))


def animation_frames(path: Path) -> Iterator[tuple[NDArray[np.uint8], float]]:
    """Yield each frame of an animation, H W 4 RGBA, and its duration in seconds.

    Raises:
        MediaError: If the file is damaged or cut short.
    """
    durations = _read_durations(path)
    with open_image(path) as image:
        orientation = _BY_EXIF.get(image.getexif().get(EXIF_ORIENTATION, 1), AS_STORED)
        for index, seconds in enumerate(durations):
            image.seek(index)
            pixels = shown_pixels(path, image, alpha=True)
            if pixels.shape[2] == 3:
                pixels = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
            yield turn_upright(pixels, orientation), seconds


def _read_durations(path: Path, maximum: int | None = None) -> list[float]:
    """Return the durations in seconds of all frames, or of the first `maximum`; empty for a still image."""
    with reading(path), path.open("rb") as file:
        start = file.read(6)
        if start[:4] == b"GIF8":
            read_durations = _read_gif_durations
        elif start[:4] == b"RIFF":
            read_durations = _read_webp_durations
        else:
            return []
        durations: list[float] = []
        try:
            for seconds in read_durations(file):
                durations.append(seconds if seconds >= SHORTEST else DEFAULT)
                if len(durations) == maximum:
                    break
        except EOFError:
            raise MediaError(f"{path} {_CUT}") from None
        return durations


def _read_gif_durations(file: BinaryIO) -> Iterator[float]:
    """Yield the duration in seconds of each frame of a GIF; the first 6 bytes have been read."""
    _skip_colors(file, _read_exactly(file, 7)[4])  # byte 4 states the size of the color table
    hundredths = 0
    while (block_type := _read_exactly(file, 1)) != b";":
        if block_type == b"!":  # an extension
            extension_label = _read_exactly(file, 1)
            size = _read_exactly(file, 1)[0]
            block = _read_exactly(file, size)
            if extension_label == b"\xf9" and size >= 3:  # graphic control extension: delay of the next frame
                hundredths = int.from_bytes(block[1:3], "little")
            if size:
                _skip_blocks(file)
        elif block_type == b",":  # an image
            _skip_colors(file, _read_exactly(file, 9)[8])
            _read_exactly(file, 1)  # size of the codes
            _skip_blocks(file)
            yield hundredths / 100
            hundredths = 0
        else:
            raise ValueError(f"a GIF block of an unknown kind, {block_type.hex()}")


def _skip_colors(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        _read_exactly(file, 3 << (flags & 7) + 1)


def _skip_blocks(file: BinaryIO) -> None:
    while size := _read_exactly(file, 1)[0]:
        _read_exactly(file, size)


def _read_webp_durations(file: BinaryIO) -> Iterator[float]:
    """Yield the duration in seconds of each frame of an animated WebP; the first 6 bytes have been read."""
    _read_exactly(file, 6)  # the rest of the file's size, and WEBP
    while header := file.read(8):
        if len(header) < 8:
            raise EOFError
        size = int.from_bytes(header[4:], "little")
        content = _read_exactly(file, min(size, 16))
        if header[:4] == b"ANMF":
            yield int.from_bytes(content[12:15], "little") / 1000
        file.seek(size + size % 2 - len(content), 1)


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise EOFError
    return content
