"""Write uint8 frames to image and video files, and join videos without encoding them again."""

import contextlib
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from modules.atomic_write import atomic_path
from modules.errors import MediaError
from modules.media.companions import Companions, needs_own_tags, open_companions
from modules.media.encoding import (
    add_video_stream,
    check_picture,
    choose_codec,
    create_container,
    encode_pictures,
    name_write_errors,
)
from modules.media.ffmpeg import av
from modules.media.reading import Frame
from modules.media.sections import SectionSound, VideoSection, open_section
from modules.media.timing import MOST_TICKS, Shown, Timing, ticks_per_second


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
    kind = choose_codec(path, codec)
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise MediaError(f"{path}: there is no frame to write")
    check_picture(path, codec, first)
    with (
        atomic_path(path) as temporary,
        name_write_errors(),
        _create(temporary, path.suffix.lower(), tags) as container,
    ):
        stream = add_video_stream(
            container, kind, first, _rate(fps), crf=crf, preset=preset, bit_rate=bit_rate
        )
        for packet in encode_pictures(stream, itertools.chain(iter([first]), remaining)):
            container.mux(packet)


@dataclass(frozen=True)
class WrittenVideo:
    """What a video has become; sizes are those of its pictures."""

    width: int
    height: int
    frames: int
    seconds: Fraction  # from the first picture to the end of the last one


def write_shown(
    path: Path,
    frames: Iterable[Shown],
    rate: Fraction,
    codec: str,
    *,
    crf: int = 12,
    preset: str = "slow",
    companions_of: Path | None = None,
    section_of: VideoSection | None = None,
    covers: bool = True,
    tags: Mapping[str, str] | None = None,
) -> WrittenVideo:
    """Encode pictures, each at its own time, to `path` (.mp4, .mkv or .mov), completely or not at all.

    frames: read one at a time; 8 and 16 bits may be mixed. Their times rise. rate: pictures a second if they
    come evenly; places n / rate are kept exactly, others to a twentieth of a millisecond, in .mkv to half of
    one. codec, crf, preset: as of `write_video`. companions_of: a video whose sound, subtitles, attachments,
    chapters and tags go into this one as they are; what the format cannot hold is logged. covers: whether
    its cover pictures do, and what else may show what was in the pictures before. section_of: a part of a
    video whose sound goes into this one, in place of all that. tags: as of `write_video`;
    they replace the video's own.
    Raises MediaError if there is no frame, the codec does not fit the suffix or the pictures, or their size
    changes; ValueError if their times do not rise; OutputError if the file cannot be written.
    """
    kind = choose_codec(path, codec)
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise MediaError(f"{path}: there is no frame to write")
    check_picture(path, codec, first.pixels)
    rate = rate.limit_denominator(MOST_TICKS)
    suffix = path.suffix.lower()
    with (
        atomic_path(path) as temporary,
        name_write_errors(),
        _open_others(companions_of, section_of, suffix, rate, covers) as others,
    ):
        all_tags = _joined_tags(others.tags if others else {}, tags or {})
        options = _shown_options(suffix, rate, all_tags)
        with create_container(temporary, suffix, all_tags, options) as container:
            stream = add_video_stream(container, kind, first.pixels, rate, crf=crf, preset=preset)
            stream.time_base = 1 / Fraction(ticks_per_second(rate))
            if others is not None:
                others.add_streams(container, stream)
            timing = Timing(rate)
            pictures = timing.note(itertools.chain(iter([first]), remaining))
            del first  # else it lives as long as the video grows; so it would in a list above
            for packet in timing.timed(encode_pictures(stream, pictures)):
                if others is None:
                    container.mux(packet)
                else:
                    others.write(container, packet.dts * packet.time_base)
                    others.mux(container, packet)
            if others is not None:
                others.write(container, None)
    return WrittenVideo(stream.width, stream.height, timing.count, timing.seconds)


@contextlib.contextmanager
def _open_others(
    whole: Path | None, section: VideoSection | None, suffix: str, rate: Fraction, covers: bool
) -> Iterator[Companions | SectionSound | None]:
    if section is not None:
        with open_section(section) as sound:
            yield sound
    else:
        with open_companions(whole, suffix, rate, covers) as companions:
            yield companions


def _shown_options(suffix: str, rate: Fraction, tags: Mapping[str, str]) -> dict[str, str]:
    """Return the options of a container to which packets come in the order of their times."""
    options = {"max_interleave_delta": "1000000"}  # microseconds: gaps in subtitles hold nothing up
    if suffix != ".mkv":
        options["movie_timescale"] = str(ticks_per_second(rate))  # of the start; usually milliseconds
        options["movflags"] = "+faststart" + "+use_metadata_tags" * needs_own_tags(tags)
    return options


def _joined_tags(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """Return all tags; new ones replace old ones whatever their case, which .mkv does not keep."""
    replaced = {name.lower() for name in new}
    return {name: value for name, value in old.items() if name.lower() not in replaced} | dict(new)


def _create(path: Path, suffix: str, tags: Mapping[str, str] | None) -> Any:
    # else only names known to the format are stored
    options = {"movflags": "use_metadata_tags"} if tags and suffix != ".mkv" else {}
    return create_container(path, suffix, tags, options)


def encode_segment(frames: Iterable[Frame], fps: float) -> bytes:
    """Encode frames quickly to an .mp4 in memory, stored in playing order, to be joined with others."""
    remaining = iter(frames)
    first = next(remaining)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = add_video_stream(
            container, choose_codec(Path("x.mp4"), "h264"), first, _rate(fps), crf=12, preset="veryfast"
        )
        stream.options = {**stream.options, "bf": "0"}
        for packet in encode_pictures(stream, itertools.chain(iter([first]), remaining)):
            container.mux(packet)
    return file.getvalue()


def join_segments(
    path: Path, segments: Sequence[bytes], fps: float, tags: Mapping[str, str] | None = None
) -> None:
    """Join what `encode_segment` has made to one video (.mp4), completely or not at all. tags: as above.

    Pictures are copied, not encoded again. A player that has an earlier file of that name open continues with
    the earlier one. Raises OutputError if the file cannot be written.
    """
    with atomic_path(path) as temporary, name_write_errors(), _create(temporary, ".mp4", tags) as target:
        stream: Any = None
        number = itertools.count()
        for segment in segments:
            with av.open(io.BytesIO(segment)) as source:
                if stream is None:
                    stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
                    stream.time_base = 1 / _rate(fps)
                for packet in source.demux(source.streams.video[0]):
                    if packet.size:  # the last one is empty
                        packet.time_base, packet.duration, packet.stream = 1 / _rate(fps), 1, stream
                        packet.pts = packet.dts = next(number)
                        target.mux(packet)


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)
