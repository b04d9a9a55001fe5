"""Copy all but the images from one video to another: audio, subtitles, attachments, chapters, tags.

Packets are copied as they are. Streams that the new format does not support are converted or left out, and
logged by name and reason.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from logging import getLogger
from pathlib import Path
from typing import Any

from modules.media.audio import add_aac, add_text, is_text, open_delayed
from modules.media.decoding import time_origin
from modules.media.encoding import MUXERS, copy_pixel_aspect, needs_own_tags
from modules.media.opening import av, is_cover, open_container
from modules.media.reading import without_images

logger = getLogger(__name__)

# tags about the program that wrote the file
_ENCODER_TAGS = re.compile(
    r"encoder|major_brand|minor_version|compatible_brands|duration|vendor_id|number_of_(frames|bytes)|bps"
    r"|_statistics_.*|rotate",
    re.IGNORECASE,
)
_DEFAULT_HANDLERS = {"SoundHandler", "VideoHandler", "SubtitleHandler", "DataHandler"}
# audio codecs that the format allows, but few programs play
_RARELY_PLAYED = {".mp4": re.compile("pcm_|vorbis"), ".mov": re.compile("vorbis")}
_COVER_FILES = {"mjpeg": ("cover.jpg", "image/jpeg"), "png": ("cover.png", "image/png")}
_MAX_FIRST_PACKETS = 1000  # packets
_DISCARD_ALL = 48  # FFmpeg's flag: discard all packets of a stream

Convert = Callable[[Any], Iterable[Any]]  # a packet (the last one is empty) -> packets to write


@dataclass
class _Track:
    """A source stream that is copied to the new file or converted for it."""

    name: str
    target: Any
    convert: Convert
    num_damaged: int = 0  # packets


class OtherStreams:
    """Copies all streams of a source video except its images to a new video, while that is written."""

    def __init__(self, path: Path, source: Any, suffix: str, rate: Fraction, with_images: bool) -> None:
        """Prepare to copy streams of an opened file; `add_streams` selects them.

        Args:
            path: Path of the opened file.
            source: The opened file.
            suffix: Suffix of the new file.
            rate: Frame rate of the new file.
            with_images: Whether to keep cover images and everything else that may contain images: XMP, and
                attachments other than fonts.
        """
        self._path, self._source, self._suffix, self._rate = path, source, suffix, rate
        self._with_images = with_images
        self._origin = time_origin(source)
        self._main_video = source.streams.best("video")
        self._tracks: dict[int, _Track] = {}  # by index of the source's stream
        self._packets: Iterator[Any] = iter(())  # packets of all copied streams
        self._next_packet: Any = None  # the next packet to write
        self._num_muxed = 0  # packets passed to FFmpeg, which may buffer them
        self._num_failed = 0  # packets among them that failed

    @property
    def tags(self) -> dict[str, str]:
        """Metadata tags that the new file can have, without those that describe the source's encoding."""
        return self._clean_tags(self._source.metadata)

    def add_streams(self, target: Any, video: Any) -> None:
        """Copy all other streams of the source and its chapters to the new file.

        `video` is the stream of the new images, which gets the tags of the source's images.
        """
        if self._main_video is not None:
            self._copy_stream_tags(video, self._main_video)
            copy_pixel_aspect(self._path, self._main_video, video)
        for stream in self._source.streams:
            if stream is not self._main_video:
                self._add_stream(target, stream)
        # The source's chapters, with their times relative to time 0 of the new file
        chapters = []
        for chapter in self._source.chapters():
            origin_ticks = round(self._origin / chapter["time_base"])
            start = max(chapter["start"] - origin_ticks, 0)
            end = max(chapter["end"] - origin_ticks, 0)
            chapters.append({**chapter, "start": start, "end": end})
        target.set_chapters(chapters)
        copied = [self._source.streams[index] for index in self._tracks]
        if copied:
            self._packets = self._read(copied)
            self._next_packet = next(self._packets, None)

    def write(self, target: Any, seconds: Fraction | None) -> None:
        """Write the packets of the copied streams up to a time of the new file; None writes all others."""
        while self._next_packet is not None:
            packet = self._next_packet
            time = packet.pts if packet.dts is None else packet.dts
            is_known = seconds is not None and time is not None
            if is_known and time * packet.time_base - self._origin > seconds:
                return
            self._write_packet(target, packet)
            self._next_packet = next(self._packets, None)
        if seconds is None:
            counts = {track.name: track.num_damaged for track in self._tracks.values()}
            counts["its sound or subtitles"] = self._num_failed
            for name, count in counts.items():
                if count:
                    logger.warning("%s: %d packets of %s are damaged and left out", self._path, count, name)

    def mux(self, target: Any, packet: Any) -> None:
        """Write a packet of the image stream, even if an earlier packet that FFmpeg buffered is damaged."""
        try:
            target.mux(packet)
        except _list_damage_errors():
            if not self._num_muxed:
                raise
            self._num_muxed -= 1
            self._num_failed += 1

    def _read(self, streams: list[Any]) -> Iterator[Any]:
        try:
            yield from self._source.demux(streams)
        except av.FFmpegError as error:
            logger.warning(
                "%s is damaged: the rest of its audio and subtitles cannot be read (%s)",
                self._path,
                error.strerror,
            )

    def _write_packet(self, target: Any, packet: Any) -> None:
        """Convert a packet, shift it to the new file's time and write it; packets that fail are counted."""
        track = self._tracks[packet.stream.index]
        try:
            converted = list(track.convert(packet))
        except av.FFmpegError:  # error of a decoder
            track.num_damaged += 1
            return
        for new_packet in converted:
            if new_packet.dts is None:
                new_packet.dts = new_packet.pts
            self._shift_times(new_packet)
            new_packet.stream = track.target
            try:
                target.mux(new_packet)
                self._num_muxed += 1
            except _list_damage_errors():
                track.num_damaged += 1

    def _shift_times(self, packet: Any) -> None:
        """Make the timestamps of a packet relative to time 0 of the new file."""
        if not self._origin:
            return
        ticks = round(self._origin / packet.time_base)
        packet.dts = None if packet.dts is None else packet.dts - ticks
        packet.pts = None if packet.pts is None else packet.pts - ticks

    def _add_stream(self, target: Any, stream: Any) -> None:
        """Copy a stream to the new file; if the format does not support it, convert it or omit it."""
        codec = (
            stream.codec_context.name if stream.codec_context is not None else getattr(stream, "name", None)
        )
        details = codec or "unknown"
        language = stream.metadata.get("language", "und")
        if language != "und":
            details += f", {language}"
        kind = {"video": "pictures", "audio": "sound"}.get(stream.type, stream.type)
        name = f"stream {stream.index} ({kind}: {details})"
        if stream.type == "video":
            self._add_images(target, stream, name)
        elif stream.type == "attachment":
            # Add an attached file to .mkv; if files that may contain images are not kept, only a font.
            file_name = stream.metadata.get("filename", "").lower()
            is_font = file_name.endswith((".ttf", ".otf", ".ttc", ".woff", ".woff2"))
            is_font = is_font or "font" in stream.metadata.get("mimetype", "").lower()
            if not self._with_images and not is_font:  # subtitles need fonts
                self._skip(name, "it may contain an image that no tool has processed", remedy="")
            elif self._suffix == ".mkv":
                mimetype = stream.metadata.get("mimetype", "application/octet-stream")
                target.add_attachment(stream.metadata.get("filename", "attachment"), mimetype, stream.data)
            else:
                self._skip(name)
        elif stream.type == "data" and (int(stream.discard) >= _DISCARD_ALL or "timecode" in stream.metadata):
            return  # FFmpeg writes it itself
        elif self._supports(stream):
            self._add_copy(target, stream, name)
        elif stream.type == "audio" and stream.codec_context is not None:
            added, convert = add_aac(target, stream)
            self._register(stream, added, name, convert)
            logger.info(
                "%s: %s is encoded to AAC, because %s files do not play it; .mkv keeps it unchanged",
                self._path,
                name,
                self._suffix,
            )
        elif stream.type == "subtitle" and is_text(stream):
            added, convert = add_text(target, stream, self._suffix)
            self._register(stream, added, name, convert)
        else:
            self._skip(name)

    def _add_images(self, target: Any, stream: Any, name: str) -> None:
        """Add a secondary video stream if it is a cover image and the new file's format supports it."""
        codec = stream.codec_context.name if stream.codec_context is not None else ""
        if not is_cover(stream):
            self._skip(name, "only the main stream of pictures is written", remedy="")
        elif not self._with_images:
            self._skip(name, "it is an image that no tool has processed", remedy="")
        elif self._suffix == ".mkv" and codec in _COVER_FILES:  # Matroska stores covers as attachments
            with open_container(self._path) as reopened:
                cover = _read_first_packet(reopened, stream.index)
            if cover is not None:
                target.add_attachment(*_COVER_FILES[codec], bytes(cover))
        # .mp4 keeps a cover as a video stream, but only if all tags are standard ones
        elif self._suffix == ".mp4" and codec in _COVER_FILES and not needs_own_tags(self.tags):
            self._add_copy(target, stream, name)
        else:
            self._skip(name)

    def _add_copy(self, target: Any, stream: Any, name: str) -> None:
        """Add a track whose packets are copied; in .mkv, audio before time 0 is declared as codec delay."""
        delayed = None
        if self._suffix == ".mkv" and stream.type == "audio":
            delayed = self._open_delayed_copy(stream)
        if delayed is None:
            added = target.add_stream_from_template(stream, opaque=True)
        else:
            with delayed:
                added = target.add_stream_from_template(delayed.streams.audio[0], opaque=True)
            added.time_base = stream.time_base
        self._register(stream, added, name, _copy)

    def _open_delayed_copy(self, stream: Any) -> Any | None:
        """Return a container that declares an audio stream's samples before time 0; None if not possible."""
        with open_container(self._path) as reopened:
            first = _read_first_packet(reopened, stream.index)
        if first is None or first.pts is None:
            return None
        seconds_before = self._origin - first.pts * first.time_base
        samples = round(seconds_before * stream.codec_context.sample_rate)
        return open_delayed(stream, samples) if samples > 0 else None

    def _supports(self, stream: Any) -> bool:
        """Return whether the new file's format can hold the stream, by writing one packet to a test file."""
        rarely_played = _RARELY_PLAYED.get(self._suffix)
        context = stream.codec_context
        is_audio = stream.type == "audio" and context is not None
        # audio codecs that the format allows but few players decode
        if is_audio and rarely_played and rarely_played.match(context.name):
            return False
        try:
            with (
                open_container(self._path) as reopened,
                av.open(BytesIO(), "w", MUXERS[self._suffix]) as trial,
            ):
                trial_stream = trial.add_stream_from_template(stream, opaque=True)
                trial.start_encoding()
                # the first text may come late in a long file
                packet = None if stream.type == "subtitle" else _read_first_packet(reopened, stream.index)
                if packet is not None:
                    packet.stream = trial_stream
                    trial.mux(packet)
        except (av.FFmpegError, ValueError):
            return False
        return True

    def _register(self, stream: Any, added: Any, name: str, convert: Convert) -> None:
        self._copy_stream_tags(added, stream)
        self._tracks[stream.index] = _Track(name, added, convert)

    def _copy_stream_tags(self, target: Any, source: Any) -> None:
        """Copy a stream's language, title and disposition to the new stream."""
        tags = self._clean_tags(source.metadata)
        title = tags.pop("name", None)  # FFmpeg's name of the title in MP4
        if title is not None:
            tags.setdefault("title", title)
        if tags.get("handler_name") in _DEFAULT_HANDLERS:
            del tags["handler_name"]
        if tags.get("language") == "und":
            del tags["language"]
        target.metadata.update(tags)
        target.disposition = int(source.disposition)

    def _clean_tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        cleaned = {name: value for name, value in tags.items() if not _ENCODER_TAGS.fullmatch(name)}
        # FFmpeg fails at drop-frame time codes (;), unless the rate is a multiple of 29.97
        if ";" in cleaned.get("timecode", "") and round(self._rate) % 30:
            del cleaned["timecode"]
        return cleaned if self._with_images else without_images(self._path, cleaned)

    def _skip(self, name: str, reason: str = "", remedy: str = "; .mkv keeps it") -> None:
        reason = reason or f"{self._suffix} files do not support it"
        logger.warning(
            "%s: %s is left out: %s%s", self._path, name, reason, "" if self._suffix == ".mkv" else remedy
        )


def _copy(packet: Any) -> list[Any]:
    return [packet] if packet.size else []


def _read_first_packet(container: Any, index: int) -> Any | None:
    """Return a stream's first packet if it is near the beginning of a newly opened file; else None."""
    beginning = itertools.islice(container.demux(), _MAX_FIRST_PACKETS)
    return next((packet for packet in beginning if packet.stream.index == index and packet.size), None)


def _list_damage_errors() -> tuple[type[Exception], ...]:
    """Return FFmpeg's exceptions for packets that it cannot write, such as packets out of order in time."""
    # The exception for a full disk is not among them.
    return (av.ArgumentError, av.InvalidDataError, av.PatchWelcomeError)
