"""Write uint8 frames to image and video files, join videos, and extract audio of a section.

Videos are joined without encoding them again. Sound of a part is decoded and encoded again (AAC): a packet of
sound contains some 20 milliseconds and cannot be cut.
"""

import contextlib
import io
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image, PngImagePlugin

from modules.atomic_write import atomic_path
from modules.errors import MediaError
from modules.media import encoding
from modules.media.colors import Frame
from modules.media.decoding import is_animation, time_origin
from modules.media.opening import av, open_container, reading
from modules.media.tracks import Track, TrackAudio

if TYPE_CHECKING:  # imported below, only if another video's streams are copied
    from modules.media.companions import OtherStreams


@dataclass(frozen=True)
class VideoSection:
    """A part of a video; times in seconds start where the file begins to play."""

    path: Path
    start: Fraction
    seconds: Fraction
    with_audio: bool = True


class SectionAudio:
    """Audio of a video section, encoded up to the time that the new video has reached."""

    def __init__(self, section: VideoSection, source: Any) -> None:
        """Prepare to read a section's audio; `source` is the opened source file."""
        self._section, self._source = section, source
        self._packets: Iterator[Any] = iter(())
        self._next_packet: Any = None

    def add_streams(self, target: Any, video: Any) -> None:
        """Add an audio stream to the new file, if there is audio, and copy the pixel aspect ratio.

        `video` is the video stream of the new file.
        """
        main = self._source.streams.best("video")
        if main is not None:
            encoding.copy_pixel_aspect(self._section.path, main, video)
        audio = self._source.streams.best("audio")
        if audio is None or audio.codec_context is None or not self._section.with_audio:
            return
        context = audio.codec_context
        from modules.media.audio import add_aac_stream

        stream = add_aac_stream(target, context.channels, context.sample_rate)
        self._packets = self._encode_track(audio.index, stream)

    def write(self, target: Any, seconds: Fraction | None) -> None:
        """Write the audio up to a time of the new file in seconds; None writes all that remains."""
        while True:
            if self._next_packet is None:
                self._next_packet = next(self._packets, None)
            if self._next_packet is None:
                return
            if seconds is not None and self._next_packet.dts * self._next_packet.time_base > seconds:
                return
            target.mux(self._next_packet)
            self._next_packet = None

    def _encode_track(self, index: int, stream: Any) -> Iterator[Any]:
        """Yield the encoded packets of an audio track, cut to the section; gaps become silence."""
        from modules.media.samples import read_filled

        layout, rate = stream.layout.name, stream.rate
        section = self._section
        begin = section.start + time_origin(self._source)
        sample_blocks = read_filled(
            section.path,
            index,
            begin,
            section.seconds,
            rate=rate,
            layout=layout,
            lenient=True,
        )
        position = 0
        for samples in sample_blocks:
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            frame.sample_rate = rate
            frame.pts = position
            frame.time_base = Fraction(1, rate)
            position += samples.shape[1]
            yield from stream.encode(frame)
        yield from stream.encode(None)


DEFAULT_TICKS = 90_000  # ticks per second, as in broadcasting; milliseconds are integers too
MAX_TICKS = 1_000_000
MIN_TICKS = 10_000


def ticks_per_second(rate: Fraction) -> int:
    """Return a number of ticks per second at which every frame of the rate starts on a whole tick."""
    ticks = math.lcm(rate.numerator, DEFAULT_TICKS)
    return ticks if ticks <= MAX_TICKS else rate.numerator * math.ceil(MIN_TICKS / rate.numerator)


class _ImageTime(NamedTuple):
    """Start and duration of a frame's display, in ticks."""

    start: int
    length: int


@dataclass
class Timing:
    """Records when each image is shown, and sets these times on the packets that the encoder returns."""

    rate: Fraction  # the encoder's number of frames per second
    count: int = 0  # images so far
    seconds: Fraction = Fraction(0)  # duration of the images so far
    _begin: Fraction = Fraction(0)  # when the first image is shown
    _end: Fraction = Fraction(0)  # when the last image so far ends
    # by index of the image, as long as a packet may need it
    _image_times: dict[int, _ImageTime] = field(default_factory=dict)

    def record(self, frames: Iterable[encoding.OutputFrame]) -> Iterator[encoding.Pixels]:
        """Yield the pixels of the frames, and record their times.

        Raises:
            ValueError: If the times do not increase.
        """
        ticks = ticks_per_second(self.rate)
        previous: Fraction | None = None
        tick = -(2**62)  # before every possible time
        for frame in frames:
            if previous is None:
                self._begin = frame.start
            elif frame.start <= previous:
                raise ValueError(
                    f"image {self.count + 1} is shown at {frame.start} s, the one before at {previous}"
                )
            previous = frame.start
            self._end = frame.start + frame.seconds
            self.seconds = self._end - self._begin
            tick = max(round(frame.start * ticks), tick + 1)  # rounded times must increase too
            self._image_times[self.count] = _ImageTime(tick, max(round(frame.seconds * ticks), 1))
            self.count += 1
            yield frame.pixels

    def assign_times(self, packets: Iterable[Any]) -> Iterator[Any]:
        """Yield the packets of an encoder, in decoding order, with timestamps instead of image indices.

        An encoder that reorders images returns the first packets with negative indices in decoding order.
        Each packet is held back until the next one arrives, because the last packet is treated differently.
        """
        held_back = None
        first_dts: int | None = None
        shortest: int | None = None  # duration of an image, in ticks
        for packet in packets:
            if shortest is None:
                shortest = min(entry.length for entry in self._image_times.values())
            # Replace the image indices of a packet by timestamps
            ticks = ticks_per_second(self.rate)
            shown_index = round(packet.pts * packet.time_base * self.rate)
            decoding_index = round(packet.dts * packet.time_base * self.rate)
            packet.time_base = Fraction(1, ticks)
            packet.pts, packet.duration = self._image_times[shown_index]
            if decoding_index >= 0:
                packet.dts = self._image_times[decoding_index].start
            else:  # counted backwards from the first image
                packet.dts = round(self._begin * ticks) + decoding_index * shortest
            for index in [index for index in self._image_times if index < decoding_index]:
                del self._image_times[index]  # no later packet needs its time
            if first_dts is None:
                first_dts = packet.dts
            if held_back is not None:
                yield held_back
            held_back = packet
        if held_back is not None and first_dts is not None:
            self._extend_last(held_back, first_dts)
            yield held_back

    def _extend_last(self, packet: Any, first_dts: int) -> None:
        """Change the timestamps of the last packet so that the file lasts as long as its images are shown."""
        ticks = ticks_per_second(self.rate)
        # Store it late: MP4 measures from a stored packet to the next, and would lose the encoder's delay if
        # an image near the end is shown for long.
        end = first_dts + round(self.seconds * ticks)
        packet.dts = max(packet.dts, min(packet.pts, end - packet.duration))
        # If another image is shown after it, extend its duration by the missing time, at most to the end.
        images_end = round(self._end * ticks)
        packet.duration = max(packet.duration, min(end - packet.dts, images_end - packet.pts))


def write_png(path: Path, frame: Frame, text: Mapping[str, str] | None = None) -> None:
    """Write one frame (H W 3 or H W 4) as PNG, with text chunks in UTF-8, completely or not at all.

    Raises:
        OutputError: If the file cannot be written.
    """
    chunks = PngImagePlugin.PngInfo()
    for name, value in (text or {}).items():
        # a plain text chunk is Latin-1, iTXt is UTF-8
        add = chunks.add_text if value.isascii() else chunks.add_itxt
        add(name, value)
    with atomic_path(path, frame.nbytes) as temporary:
        Image.fromarray(frame).save(temporary, format="PNG", pnginfo=chunks)


# suffix -> Pillow's format and settings: lossless except for JPEG, which keeps full color resolution
STILL_FORMATS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 100, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 100, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
    ".bmp": ("BMP", {}),
}


def write_still(path: Path, frame: Frame) -> None:
    """Write one frame (H W 3, or H W 4 as PNG or WebP) in the format of its suffix, one of `STILL_FORMATS`.

    The file is written atomically.

    Raises:
        OutputError: If the file cannot be written.
    """
    name, settings = STILL_FORMATS[path.suffix.lower()]
    with atomic_path(path, frame.nbytes) as temporary:
        Image.fromarray(frame).save(temporary, format=name, **settings)


def write_video(
    path: Path,
    frames: Iterable[Frame],
    fps: float,
    codec: str = "h264",
    crf: int = 12,
    preset: str = "slow",
    bit_rate: int | None = None,
    tags: Mapping[str, str] | None = None,
    track: Track | None = None,
) -> None:
    """Encode frames (H W 3, read one at a time) to `path` (.mp4, .mkv or .mov), completely or not at all.

    `codec` is h264, h265 (yuv420p) or prores (.mkv, .mov; 10 bit). `bit_rate` is bits per second instead of
    crf. `tags` are texts to store by name; .mkv shows names in upper case. `track` is audio that begins with
    the first frame; it is cut or padded with silence to last as long as the images. The last row or column of
    an odd size is cropped. Colors are BT.709 and tagged as such. Neither a creation time nor random ids are
    written.

    Raises:
        MediaError: If there is no frame, the codec does not fit the suffix, or the frames are too small for
            it.
        OutputError: If the file cannot be written.
    """
    rate = _make_rate(fps)
    images = (encoding.OutputFrame(frame, index / rate, 1 / rate) for index, frame in enumerate(frames))
    write_timed_video(
        path, images, rate, codec, crf=crf, preset=preset, bit_rate=bit_rate, tags=tags, track=track
    )


@dataclass(frozen=True)
class WrittenVideo:
    """Frame size, frame count and duration of a written video."""

    width: int
    height: int
    frames: int
    seconds: Fraction  # from the first image to the end of the last one


def write_timed_video(
    path: Path,
    frames: Iterable[encoding.OutputFrame],
    rate: Fraction,
    codec: str,
    *,
    crf: int = 12,
    preset: str = "slow",
    bit_rate: int | None = None,
    copied_video: Path | None = None,
    audio_section: VideoSection | None = None,
    with_images: bool = True,
    tags: Mapping[str, str] | None = None,
    track: Track | None = None,
) -> WrittenVideo:
    """Encode images, each at its own time, to `path` (.mp4, .mkv or .mov), completely or not at all.

    Args:
        path: File to write.
        frames: Images with increasing times, read one at a time; 8 and 16 bits may be mixed.
        rate: Images per second if they are evenly spaced. Times n / rate are kept exactly, other times to a
            twentieth of a millisecond, in .mkv to half of one.
        codec: h264, h265 (yuv420p) or prores (.mkv, .mov; 10 bit).
        crf: Quality.
        preset: Speed of x264 and x265.
        bit_rate: Bits per second instead of `crf`.
        copied_video: Video whose audio, subtitles, attachments, chapters and tags are copied into this one
            without re-encoding; parts that the format does not support are logged.
        audio_section: Part of a video from which only the audio is copied.
        with_images: Whether cover images of `copied_video`, and other parts that may show the old images, are
            copied too.
        tags: Strings to store, by name; they replace the copied tags of these names.
        track: Generated audio.

    Raises:
        MediaError: If there is no frame, the codec does not fit the suffix or the images, or their size
            changes.
        ValueError: If their times do not increase.
        OutputError: If the file cannot be written.
    """
    selected_codec = encoding.select_codec(path, codec)
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise MediaError(f"{path}: there is no frame to write")
    encoding.check_image(path, codec, first.pixels)
    rate = rate.limit_denominator(MAX_TICKS)
    suffix = path.suffix.lower()
    timing = Timing(rate)
    generated_audio = None if track is None else TrackAudio(track, lambda: timing.seconds)
    with (
        atomic_path(path) as temporary,
        encoding.name_write_errors(),
        _open_stream_writers(
            generated_audio, copied_video, audio_section, suffix=suffix, rate=rate, with_images=with_images
        ) as writers,
    ):
        all_tags = dict(tags or {})
        if writers.copied_video is not None:
            all_tags = _replace_tags(writers.copied_video.tags, all_tags)
        with _create_container(temporary, suffix, rate, all_tags) as container:
            stream = encoding.add_video_stream(
                container, selected_codec, first.pixels, rate, crf=crf, preset=preset, bit_rate=bit_rate
            )
            stream.time_base = 1 / Fraction(ticks_per_second(rate))
            images = timing.record(itertools.chain(iter([first]), remaining))
            del first  # free the frame: it would stay in memory during the whole encoding
            packets = timing.assign_times(encoding.encode_images(stream, images))
            _write_packets(container, stream, packets, writers)
    return WrittenVideo(stream.width, stream.height, timing.count, timing.seconds)


def _write_packets(container: Any, stream: Any, packets: Iterable[Any], writers: "_StreamWriters") -> None:
    """Write the packets of the images, each after earlier packets of the other streams."""
    if writers.side_streams is not None:
        writers.side_streams.add_streams(container, stream)
    for packet in packets:
        if writers.side_streams is not None:
            writers.side_streams.write(container, packet.dts * packet.time_base)
        if writers.copied_video is not None:
            writers.copied_video.mux(container, packet)
        else:
            container.mux(packet)
    if writers.side_streams is not None:
        writers.side_streams.write(container, None)


def _replace_tags(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    replaced = {name.lower() for name in new}  # in any case, because .mkv changes it
    return {name: text for name, text in old.items() if name.lower() not in replaced} | dict(new)


def _create_container(path: Path, suffix: str, rate: Fraction, tags: Mapping[str, str]) -> Any:
    """Open a video file for writing, with tags and start times in whole ticks."""
    options = {"max_interleave_delta": "1000000"}  # microseconds; gaps in subtitles must not delay writing
    if suffix != ".mkv":
        options["movie_timescale"] = str(ticks_per_second(rate))  # for the start time; default: milliseconds
        options["movflags"] = "+faststart" + "+use_metadata_tags" * encoding.needs_own_tags(tags)
    return encoding.create_container(path, suffix, tags, options)


class _StreamWriters(NamedTuple):
    """The writers that add audio, subtitles and other streams to a new video next to its images."""

    side_streams: "TrackAudio | OtherStreams | SectionAudio | None"  # None: there are no other streams
    copied_video: "OtherStreams | None"  # the same object, if it copies the streams of a whole video


@contextlib.contextmanager
def _open_stream_writers(
    generated: TrackAudio | None,
    video: Path | None,
    section: VideoSection | None,
    *,
    suffix: str,
    rate: Fraction,
    with_images: bool,
) -> Iterator[_StreamWriters]:
    """Yield the writer of a generated track, of a section's audio, or of all streams of a video."""
    # The writers are None for a GIF or WebP animation, which has no such streams.
    path = video if section is None else section.path
    if generated is not None:
        yield _StreamWriters(side_streams=generated, copied_video=None)
        return
    if path is None or is_animation(path):
        yield _StreamWriters(side_streams=None, copied_video=None)
        return
    with reading(path):
        source = open_container(path)
    with source:
        if section is None:
            from modules.media.companions import OtherStreams  # only if streams are copied

            other_streams = OtherStreams(path, source, suffix, rate=rate, with_images=with_images)
            yield _StreamWriters(side_streams=other_streams, copied_video=other_streams)
        else:
            yield _StreamWriters(side_streams=SectionAudio(section, source), copied_video=None)


def encode_segment(frames: Iterable[Frame], fps: float) -> bytes:
    """Encode frames quickly to an .mp4 in memory, for `join_segments`: no frame refers to a later one."""
    remaining = iter(frames)
    first = next(remaining)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = encoding.add_video_stream(
            container,
            encoding.select_codec(Path("x.mp4"), "h264"),  # only the path's suffix counts
            first,
            _make_rate(fps),
            crf=12,
            preset="veryfast",
        )
        stream.options = {**stream.options, "bf": "0"}  # no B-frames, which refer to later frames
        for packet in encoding.encode_images(stream, itertools.chain(iter([first]), remaining)):
            container.mux(packet)
    return file.getvalue()


def join_segments(
    path: Path, segments: Sequence[bytes], fps: float, tags: Mapping[str, str] | None = None
) -> None:
    """Join segments from `encode_segment` to one .mp4, completely or not at all.

    `tags` are the strings to store, by name.

    Images are copied, not encoded again. A player that has an earlier file of this name open keeps showing
    the earlier one.

    Raises:
        OutputError: If the file cannot be written.
    """
    options = {"movflags": "use_metadata_tags"}  # otherwise MP4 stores only its standard tags
    stream: Any = None
    number = itertools.count()
    with (
        atomic_path(path) as temporary,
        encoding.name_write_errors(),
        encoding.create_container(temporary, ".mp4", tags, options) as target,
    ):
        for segment in segments:
            with av.open(io.BytesIO(segment), "r") as source:
                if stream is None:
                    stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
                    stream.time_base = 1 / _make_rate(fps)
                for packet in source.demux(source.streams.video[0]):
                    if packet.size:  # the last one is empty
                        packet.time_base = 1 / _make_rate(fps)
                        packet.duration = 1
                        packet.stream = stream
                        packet.pts = packet.dts = next(number)  # equal, as no frame refers to a later one
                        target.mux(packet)


def _make_rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)
