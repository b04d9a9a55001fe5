"""Open untrusted images and videos: only self-contained formats, no other files, no excessive sizes.

FFmpeg and Pillow choose a reader by a file's content, not by its suffix: a clip may be a list of other files
(concat, HLS), a name a pattern for many (image2), an image a program for Ghostscript (EPS). None is opened.
"""

import contextlib
import struct
import sys
import traceback
import zlib
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from modules.errors import InstallationError, MediaError, UserError
from modules.limits import (
    MAX_DECODED_BYTES,
    MAX_FRAME_BYTES,
    MAX_IMAGE_BYTES,
    MAX_LONE_FRAME_BYTES,
    MAX_PIXELS,
)
from modules.text_files import require_regular_file

# FFmpeg's names of self-contained formats; the last two lines: raw streams, and single images
VIDEO_FORMATS = (
    "mov", "matroska", "avi", "flv", "asf", "mpeg", "mpegts", "ogg",
    "gif", "apng", "nut", "mxf", "rm", "wtv", "dv", "swf",
    "mpegvideo", "m4v", "h264", "hevc", "ivf", "obu", "mjpeg", "yuv4mpegpipe",
    "png_pipe", "jpeg_pipe", "bmp_pipe", "webp_pipe", "tiff_pipe",
)  # fmt: skip
# suffixes of audio files, lower case
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".oga", ".opus", ".aif"})
AUDIO_SUFFIXES |= {".aiff", ".wma", ".mka", ".ac3"}
# FFmpeg's names of the formats above, and of audio formats
AUDIO_FORMATS = (
    *VIDEO_FORMATS,
    "wav", "w64", "flac", "mp3", "aac", "ac3", "eac3", "aiff", "caf", "au", "amr", "dts", "tta", "wv", "ape",
)  # fmt: skip
# Pillow's names of formats that it decodes itself
IMAGE_FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "BMP", "AVIF", "HEIF", "JXL",
    "DIB", "GIF", "TIFF", "JPEG2000", "PPM", "ICO", "TGA",
)  # fmt: skip
# measured bytes per pixel while an image of a format is decoded and rotated; other formats
# take at most DECODED_BYTES: 4 as Pillow holds them, 8 as a decoder does or as they are returned
DECODER_BYTES = {"WEBP": 17, "JPEG2000": 25, "AVIF": 30, "HEIF": 30, "JXL": 40}
DECODED_BYTES = 12
# open no other files and no network; the last two disable MOV's external data references
_NO_OTHER_FILES = {
    "protocol_whitelist": "file",
    "enable_drefs": "0",
    "use_absolute_path": "0",
}
LARGE_FRAME_BYTES = 1 << 25  # of a decoded frame; larger than 10-bit 4K
_LONE_CODECS = frozenset({"png", "ffv1"})  # intra-only codecs that FFmpeg does not mark as such
ATTACHED_IMAGE = 1 << 10  # FFmpeg's flag of cover images, which it treats as video streams

# errors that damaged files cause wherever they are read; of decoders, every error counts
_DAMAGE: tuple[type[Exception], ...] = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, OverflowError, struct.error, zlib.error,
)  # fmt: skip


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image and read only its header. Raises MediaError, also for errors inside the `with` block."""
    Image.init()
    with (
        reading(path),
        Image.open(path, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN]) as image,
    ):
        check_pixels(path, *image.size)
        # Raise MediaError if an image would take too much memory to decode
        width, height = image.size
        num_bytes = width * height * DECODER_BYTES.get(image.format or "", DECODED_BYTES)
        if num_bytes > MAX_DECODED_BYTES:
            raise MediaError(
                f"{path} has {width} x {height} pixels as {image.format}, which takes {num_bytes / 1e9:.1f} "
                "GB "
                f"of memory to decode; at most {MAX_DECODED_BYTES / 1e9:.1f} GB are allowed. Make the image "
                "smaller, or save it as PNG or JPEG."
            )
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise MediaError(
                f"{path} has {path.stat().st_size:,} bytes; images have at most {MAX_IMAGE_BYTES:,}. Save it "
                "as PNG or JPEG, without metadata."
            )
        if image.mode in {"I", "F"}:
            raise MediaError(f"{path} has 32-bit values without a defined white. Convert it to PNG.")
        yield image


@contextlib.contextmanager
def open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a video and yield (its container, its video stream).

    Raises:
        MediaError: If it cannot be read, also for errors inside the block.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(reading(path))
        try:
            container = stack.enter_context(open_container(path))
        except av.FFmpegError:
            reject_cut(path)
            raise
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None or is_cover(stream):
            raise _explain_missing_video(path, container, stream)
        check_pixels(path, stream.width, stream.height)
        # a decoder keeps many frames, so the bytes of one are limited
        codec = stream.codec_context
        is_intra_only = codec.codec.intra_only or codec.name in _LONE_CODECS
        max_bytes = MAX_LONE_FRAME_BYTES if is_intra_only else MAX_FRAME_BYTES
        num_bytes = codec.width * codec.height * _pixel_bits(codec) // 8
        if num_bytes > max_bytes:
            raise MediaError(
                f"{path} has frames of {codec.width} x {codec.height} pixels, {num_bytes / 1e6:.0f} MB each "
                f"when they are decoded; at most {max_bytes / 1e6:.0f} MB are read. Make the clip smaller."
            )
        # the size may change within a stream
        codec.options = {"max_pixels": str(min(MAX_PIXELS, 8 * max_bytes // _pixel_bits(codec)))}
        yield container, stream


def _explain_missing_video(path: Path, container: Any, stream: Any | None) -> MediaError:
    """Return why a file has no decodable video stream. Raises MediaError if the file is cut short."""
    if stream is None or stream.codec_context is None:
        reject_cut(path)
    if stream is None:
        kinds = ", ".join(stream.type for stream in container.streams) or "nothing"
        return MediaError(f"{path} has no video stream, only {kinds}")
    if is_cover(stream):  # cover image of a song
        return MediaError(f"{path} has no video stream, only sound and a cover picture")
    return MediaError(f"{path} is damaged, or its video has a format that FFmpeg here does not support")


def _pixel_bits(codec: Any) -> int:
    """Return the bits per decoded pixel, as for RGB if the file does not state its pixel format."""
    return 24 if codec.format is None else max(1, codec.format.padded_bits_per_pixel)


def has_large_frames(codec: Any) -> bool:
    """Return whether a decoded frame takes more than `LARGE_FRAME_BYTES`."""
    return codec.width * codec.height * _pixel_bits(codec) > 8 * LARGE_FRAME_BYTES


# types of the first box in MP4 and MOV files
_FIRST_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"})
_MAX_BOXES = 100_000  # maximum number of boxes in a fragmented file


def reject_cut(path: Path) -> None:
    """Raise MediaError if an MP4 or MOV file ends before its boxes do, or without its index.

    Source: ISO/IEC 14496-12, 4.2.
    """
    size = path.stat().st_size
    position = 0  # offset of the next box
    box_types: set[bytes] = set()
    with path.open("rb") as file:
        for _ in range(_MAX_BOXES):
            file.seek(position)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            box_type = head[4:8]
            if not box_types and box_type not in _FIRST_BOXES:  # neither MP4 nor MOV
                return
            extends_to_end = length == 0 and len(head) > 7  # as the last box may
            if not head or extends_to_end:
                break
            box_types.add(box_type)
            if length == 1:  # the length follows the type, in 64 bits
                length = int.from_bytes(head[8:], "big")
            position += max(length, 8)
            if position > size:
                raise MediaError(
                    f"{path} is cut short: it has {size:,} bytes of at least {position:,}. Download it again."
                )
    if b"moov" not in box_types:
        raise MediaError(
            f"{path} is cut short: its index, which is at its end, is missing. Download it again."
        )


def open_container(path: Path, formats: Sequence[str] = VIDEO_FORMATS) -> Any:
    """Open a container if it has one of these formats, without opening any other file.

    Raises:
        MediaError: If the format is not among `formats`, or if the file is a list of other files.
        FFmpegError: If FFmpeg cannot open the file.
    """
    options = {"format_whitelist": ",".join(formats), **_NO_OTHER_FILES}
    try:
        # without `file:`, FFmpeg would read a name such as `take:2.mkv` as a protocol
        return av.open(f"file:{path}", metadata_errors="replace", options=options)
    except av.ArgumentError:  # FFmpeg's error for a format that is not in the list
        kind, examples = (
            ("video", ".mp4, .mov, .mkv") if formats is VIDEO_FORMATS else ("sound", ".wav, .flac")
        )
        raise MediaError(
            f"{path} is in no supported {kind} format, or it is a list of other files, which are not opened. "
            f"Pass the {kind} itself, such as a {examples} or .webm."
        ) from None


def require_media(path: Path) -> None:
    """Raise MediaError if a file is not an image, clip or audio file in a supported format.

    Only the beginning is read, so the file may still be damaged or too large.
    """
    Image.init()
    with reading(path):
        try:
            with Image.open(path, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN]):
                return
        except UnidentifiedImageError:
            pass
        try:
            with open_container(path, AUDIO_FORMATS) as container:
                if container.streams.video or container.streams.audio:
                    return
        except (MediaError, av.FFmpegError):
            pass
    raise MediaError(f"{path} is not an image, video or audio file in a supported format.")


def is_cover(stream: Any) -> bool:
    """Return whether a stream is a cover image, as in music files."""
    return bool(int(stream.disposition) & ATTACHED_IMAGE)


def check_pixels(path: Path, width: int, height: int) -> None:
    """Raise MediaError if an image has more than MAX_PIXELS pixels."""
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{path} has {width} x {height} pixels, {width * height / 1e6:.0f} million; at most "
            f"{MAX_PIXELS / 1e6:.0f} million are read, as more would take gigabytes of memory. "
            "Make the image smaller."
        )


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert errors of Pillow and FFmpeg to MediaError; also raise it if `path` is not a file or folder."""
    if path.is_symlink() and not path.exists():
        raise MediaError(f"{path} is a link to {path.readlink()}, which does not exist")
    if not path.exists():
        raise MediaError(f"{path} does not exist")
    try:
        if not path.is_dir():
            require_regular_file(path)
            if path.stat().st_size == 0:
                raise MediaError(f"{path} is empty (0 bytes)")
        yield
    except UnidentifiedImageError:
        if _is_video(path):
            raise MediaError(f"{path} is a video, but an image is needed") from None
        raise MediaError(f"{path} is not an image that can be read, or it is damaged") from None
    except Image.DecompressionBombError:  # Pillow checks the size first, with a limit above ours
        raise MediaError(
            f"{path} has more than {MAX_PIXELS / 1e6:.0f} million pixels, which is the limit. Make the "
            "image smaller."
        ) from None
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, _DAMAGE) and not _is_from_decoder(error):
            raise  # a mistake of ours, or memory of the graphics card
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if "truncated" in reason.lower():  # Pillow's message: Truncated File Read
            reason = "the file is cut short"
        raise MediaError(f"{path} cannot be read: {reason}") from error


def _is_from_decoder(error: Exception) -> bool:
    """Return whether FFmpeg, Pillow or one of its plugins has raised the error, whatever its type."""
    # the class of FFmpeg's errors exists only if its package has been imported
    if isinstance(error, getattr(sys.modules.get("av"), "FFmpegError", ())):
        return True
    packages = {"PIL"} | {factory.__module__.partition(".")[0] for factory, _ in Image.OPEN.values()}
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").partition(".")[0] in packages for frame, _ in frames)


def _is_video(path: Path) -> bool:
    """Return whether FFmpeg finds a video stream in a file that Pillow cannot open."""
    try:
        with open_container(
            path, [name for name in VIDEO_FORMATS if not name.endswith("_pipe")]
        ) as container:
            return bool(container.streams.video)
    except Exception as error:
        if not isinstance(error, (UserError, *_DAMAGE)) and not _is_from_decoder(error):
            raise
        return False


# Import PyAV, which includes FFmpeg, at its first use: reading images or caches does not need it.
if TYPE_CHECKING:
    import av as av
    import av.sidedata.sidedata
else:

    class _WhenUsed:
        """Stand-in for a module that is imported when one of its attributes is first used."""

        def __getattr__(self, name: str) -> Any:
            try:
                return getattr(import_module("av"), name)
            except ModuleNotFoundError as error:
                raise InstallationError(
                    f"videos are read and written with the package av, which cannot be imported ({error}). "
                    f"Install it: {sys.executable} -m pip install av"
                ) from None

    av = _WhenUsed()
