"""Re-encode audio and convert subtitles for files that cannot contain them unchanged."""

import functools
import re
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from io import BytesIO
from typing import Any

from modules.media.opening import av

# sampling rates of FFmpeg's AAC encoder
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}  # by channels
BITS_PER_CHANNEL = 128_000  # bits per second; inaudible losses for most people
# seconds; longer gaps are filled with silence, shorter ones are rounding
SHORTEST_GAP, LONGEST_GAP = Fraction(1, 20), 3600


def add_aac_stream(target: Any, channels: int, rate: int) -> Any:
    """Add an AAC stream to a file, at the nearest sampling rate that the encoder supports."""
    stream = target.add_stream("aac", rate=min(_AAC_RATES, key=lambda allowed: abs(allowed - rate)))
    # FFmpeg's name; stereo if there is no common one
    stream.layout = _LAYOUTS.get(channels, "stereo")
    stream.bit_rate = BITS_PER_CHANNEL * min(channels, 8)
    return stream


def add_aac(target: Any, source: Any) -> tuple[Any, Callable[[Any], Iterator[Any]]]:
    """Add an AAC stream for the audio of `source`, a stream of another file.

    Returns the new stream, and a function that converts packets of `source` to packets to write. It must also
    get the empty last packet.
    """
    context = source.codec_context  # use the channel count, because raw audio in Matroska has no layout
    stream = add_aac_stream(target, context.channels, context.sample_rate)
    return stream, functools.partial(_convert_to_aac, stream, _Gapless(source.time_base))


def _convert_to_aac(stream: Any, gapless: "_Gapless", packet: Any) -> Iterator[Any]:
    """Decode an audio packet and yield AAC packets; the empty last packet flushes the encoder."""
    for frame in packet.decode():
        for part in gapless.fill_gap(frame):
            yield from stream.encode(part)
    if not packet.size:
        yield from stream.encode(None)


class _Gapless:
    """Fills gaps between decoded audio frames with silence, because encoders ignore gaps."""

    def __init__(self, time_base: Fraction) -> None:
        self._time_base = time_base
        self._next_index: int | None = None  # index of the next sample

    def fill_gap(self, frame: Any) -> Iterator[Any]:
        """Yield silence for any gap before a frame, then the frame, timed to follow directly."""
        rate = frame.sample_rate
        if frame.pts is not None:
            expected = round(frame.pts * (frame.time_base or self._time_base) * rate)
            gap = 0 if self._next_index is None else expected - self._next_index
            if self._next_index is None:
                self._next_index = expected
            elif SHORTEST_GAP * rate < gap < LONGEST_GAP * rate:
                for start in range(0, gap, rate):
                    yield self._number_frame(_make_silence(frame, min(rate, gap - start)))
        yield self._number_frame(frame)

    def _number_frame(self, frame: Any) -> Any:
        frame.pts = self._next_index = self._next_index or 0
        frame.time_base = Fraction(1, frame.sample_rate)
        self._next_index += frame.samples
        return frame


def _make_silence(like: Any, samples: int) -> Any:
    frame = av.AudioFrame(format=like.format.name, layout=like.layout.name, samples=samples)
    frame.sample_rate = like.sample_rate
    middle = b"\x80" if like.format.name.startswith("u8") else b"\0"
    for plane in frame.planes:
        plane.update(middle * plane.buffer_size)
    return frame


# Tell Matroska that sound begins before time 0, with samples that only start the decoder.
#
# MP4 has such packets at negative times. FFmpeg would move everything else after them, unless the stream
# says how many samples they are; PyAV gives such a stream only for a Matroska file. So one is made in
# memory.
# FFmpeg's decoder -> Matroska's name of the codec
_CODECS = {
    "aac": b"A_AAC",
    "mp3": b"A_MPEG/L3",
    "mp3float": b"A_MPEG/L3",
    "ac3": b"A_AC3",
    "eac3": b"A_EAC3",
    "alac": b"A_ALAC",
}
_NANOSECONDS = 1e9


# ids of Matroska's elements
_EBML_HEADER, _DOC_TYPE, _DOC_TYPE_VERSION, _DOC_TYPE_READ_VERSION = 0x1A45DFA3, 0x4282, 0x4287, 0x4285
_SEGMENT, _INFO, _TIMESTAMP_SCALE = 0x18538067, 0x1549A966, 0x2AD7B1
_TRACKS, _TRACK_ENTRY = 0x1654AE6B, 0xAE
_CLUSTER, _TIMESTAMP, _SIMPLE_BLOCK = 0x1F43B675, 0xE7, 0xA3


def open_delayed(stream: Any, samples: int) -> Any | None:
    """Return an open container with a copy of `stream` that declares an initial delay of `samples` samples.

    The container is a Matroska file in memory with one track and one empty packet. Return None if the codec
    cannot declare a delay, or if `stream` does so already. Source of the layout: RFC 9559.
    """
    context = stream.codec_context
    if context is None or context.name not in _CODECS or context.delay:
        return None
    doc_type = _encode_element(_DOC_TYPE, b"matroska")
    versions = _encode_number(_DOC_TYPE_VERSION, 4) + _encode_number(_DOC_TYPE_READ_VERSION, 2)
    header = _encode_element(_EBML_HEADER, doc_type + versions)
    info = _encode_element(_INFO, _encode_number(_TIMESTAMP_SCALE, 1_000_000))  # times are in milliseconds
    tracks = _encode_element(_TRACKS, _encode_element(_TRACK_ENTRY, _track_info(context, samples)))
    # a file without packets cannot be opened
    packet = _encode_element(_SIMPLE_BLOCK, b"\x81\0\0\x80" + bytes(8))
    cluster = _encode_element(_CLUSTER, _encode_number(_TIMESTAMP, 0) + packet)
    segment = _encode_element(_SEGMENT, info + tracks + cluster)
    try:
        return av.open(BytesIO(header + segment))
    except av.FFmpegError:
        return None


def _track_info(context: Any, samples: int) -> bytes:
    """Return the Matroska elements that describe a track: number, codec, delay and audio format."""
    numbers = _encode_number(0xD7, 1) + _encode_number(0x73C5, 1)  # number and id of the track
    audio_type = _encode_number(0x83, 2)  # 1 is video, 2 is audio
    codec = _encode_element(0x86, _CODECS[context.name])
    private = _encode_element(0x63A2, bytes(context.extradata)) if context.extradata else b""
    delay = _encode_number(0x56AA, round(samples * _NANOSECONDS / context.sample_rate))
    rate = _encode_element(0xB5, struct.pack(">d", context.sample_rate))
    audio = _encode_element(0xE1, rate + _encode_number(0x9F, context.channels))
    return numbers + audio_type + codec + private + delay + audio


def _encode_element(name: int, data: bytes) -> bytes:
    """Encode a Matroska element: its ID, the length of its data in 4 bytes, and the data."""
    return (
        name.to_bytes((name.bit_length() + 7) // 8, "big")
        + (0x10000000 | len(data)).to_bytes(4, "big")
        + data
    )


def _encode_number(name: int, value: int) -> bytes:
    return _encode_element(name, value.to_bytes(8, "big"))


# Convert text subtitles between formats that store text differently; styles are dropped.
_TEXT = {"subrip", "srt", "ass", "ssa", "webvtt", "mov_text", "text"}
_ENCODERS = {".mkv": "srt", ".mp4": "mov_text", ".mov": "mov_text"}
_ASS_FIELDS = 8  # fields before the text: order, layer, style, name, three margins, effect
# style header that the encoders require before any text
_HEADER = b"""[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize
Style: Default,Arial,16

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""


def is_text(stream: Any) -> bool:
    """Return whether a stream contains text subtitles."""
    return stream.codec_context is not None and stream.codec_context.name in _TEXT


def add_text(target: Any, source: Any, suffix: str) -> tuple[Any, Callable[[Any], Iterator[Any]]]:
    """Add a stream to the container `target` for copying `source`, a subtitle stream of another file.

    `suffix` is the suffix of the target file. Returns the new stream, and a function that converts packets of
    `source` to packets of the new stream.
    """
    stream = target.add_stream(_ENCODERS[suffix])
    stream.codec_context.subtitle_header = _HEADER
    stream.codec_context.time_base = source.time_base
    with_length = suffix != ".mkv"  # MP4 and MOV store the length of a text before it
    return stream, functools.partial(_convert_subtitle, source.codec_context.name, with_length)


def _convert_subtitle(codec: str, with_length: bool, packet: Any) -> Iterator[Any]:
    """Yield the subtitle packet converted to plain text, or nothing if its text is empty."""
    text = _read_subtitle(codec, bytes(packet) if packet.size else b"")
    if not text:
        return
    encoded = text.encode("utf-8")
    if with_length:
        encoded = len(encoded).to_bytes(2, "big") + encoded
    repacked = av.Packet(encoded)
    repacked.time_base = packet.time_base
    repacked.duration = packet.duration
    repacked.pts = packet.pts
    repacked.dts = packet.dts
    repacked.is_keyframe = True
    yield repacked


def _read_subtitle(codec: str, content: bytes) -> str:
    """Return the text of a subtitle packet without markup."""
    if codec == "mov_text":
        length = int.from_bytes(content[:2], "big")
        return content[2 : 2 + length].decode("utf-8", "replace").strip()
    text = content.decode("utf-8", "replace")
    if codec in ("ass", "ssa"):
        text = _without_markup(r"\{[^}]*\}", text.split(",", _ASS_FIELDS)[-1])
        text = text.replace(r"\N", "\n").replace(r"\n", "\n").replace(r"\h", " ")
    else:
        text = _without_markup(r"</?[a-zA-Z][^>]*>", text)
    return text.strip()


def _without_markup(pattern: str, text: str) -> str:
    """Return the text without the markup that a pattern matches."""
    # The pattern's last character ends a tag. Only the text up to its last occurrence is searched, because
    # each possible start of a tag would scan all the text after it.
    before, end, rest = text.rpartition(pattern[-1])
    return re.sub(pattern, "", before + end) + rest
