"""Encode sound anew for files that cannot hold it as it is."""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from typing import Any

from modules.media.ffmpeg import av

# what FFmpeg's encoder takes
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}  # by channels
BITS_PER_CHANNEL = 128_000  # a second; transparent to most ears
# seconds: a gap in the times of the sound that is filled with silence; less is rounding
SHORTEST_GAP, LONGEST_GAP = Fraction(1, 20), 3600


@dataclass(frozen=True)
class AacFormat:
    """Format that sound is turned into."""

    rate: int  # samples a second
    layout: str
    channels: int
    bit_rate: int


def aac_format(source: Any) -> AacFormat:
    """Return the format for the sound of `source`, a stream of another file."""
    rate = min(_AAC_RATES, key=lambda allowed: abs(allowed - source.codec_context.sample_rate))
    # by name: raw sound in Matroska has only a number of channels
    given = source.codec_context.channels
    channels = given if given in _LAYOUTS else 2
    return AacFormat(rate, _LAYOUTS[channels], channels, BITS_PER_CHANNEL * min(given, 8))


def add_aac_stream(target: Any, form: AacFormat) -> Any:
    """Add an AAC stream to a file."""
    stream = target.add_stream("aac", rate=form.rate)
    stream.layout = form.layout
    stream.bit_rate = form.bit_rate
    return stream


def add_aac(target: Any, source: Any) -> tuple[Any, Callable[[Any], Iterator[Any]]]:
    """Add an AAC stream to a file for the sound of `source`, a stream of another file.

    Returns it, and a function from packets of `source`, up to the empty last one, to packets to write.
    """
    stream = add_aac_stream(target, aac_format(source))
    gapless = _Gapless(source.time_base)

    def convert(packet: Any) -> Iterator[Any]:
        for frame in packet.decode():
            for part in gapless.follow(frame):
                yield from stream.encode(part)
        if not packet.size:
            yield from stream.encode(None)

    return stream, convert


class _Gapless:
    """Number the samples of decoded sound: an encoder takes them one after the other."""

    def __init__(self, time_base: Fraction) -> None:
        self._time_base = time_base
        self._next: int | None = None  # number of the sample that comes next

    def follow(self, frame: Any) -> Iterator[Any]:
        """Yield a frame behind the ones before it, and silence before it if some is missing."""
        rate = frame.sample_rate
        if frame.pts is not None:
            wanted = round(frame.pts * (frame.time_base or self._time_base) * rate)
            gap = 0 if self._next is None else wanted - self._next
            if self._next is None:
                self._next = wanted
            elif SHORTEST_GAP * rate < gap < LONGEST_GAP * rate:
                for start in range(0, gap, rate):
                    yield self._numbered(_silence(frame, min(rate, gap - start)))
        yield self._numbered(frame)

    def _numbered(self, frame: Any) -> Any:
        frame.pts = self._next = self._next or 0
        frame.time_base = Fraction(1, frame.sample_rate)
        self._next += frame.samples
        return frame


def _silence(like: Any, samples: int) -> Any:
    frame = av.AudioFrame(format=like.format.name, layout=like.layout.name, samples=samples)
    frame.sample_rate = like.sample_rate
    middle = b"\x80" if like.format.name.startswith("u8") else b"\0"
    for plane in frame.planes:
        plane.update(middle * plane.buffer_size)
    return frame


# Tell Matroska that sound begins before time 0, with samples that only start the decoder.
#
# MP4 has such packets at negative times. FFmpeg would move everything else behind them, unless the stream
# says how many samples they are; PyAV gives such a stream only for a Matroska file. So one is made in
# memory.
# Matroska's names of codecs, by those of FFmpeg's decoders
_CODECS = {
    **{"aac": b"A_AAC", "mp3": b"A_MPEG/L3", "mp3float": b"A_MPEG/L3"},
    **{"ac3": b"A_AC3", "eac3": b"A_EAC3", "alac": b"A_ALAC"},
}


def open_delayed(stream: Any, samples: int) -> Any | None:
    """Return an open container whose only stream is like `stream`, but says that it begins with `samples`.

    None if that cannot be said of its codec, or if it says it itself. Source of the layout: RFC 9559.
    """
    context = stream.codec_context
    if context is None or context.name not in _CODECS or context.delay:
        return None
    rate = _element(0xB5, struct.pack(">d", context.sample_rate))
    sound = _element(0xE1, rate + _number(0x9F, context.channels))
    delay = _number(0x56AA, round(samples * 1e9 / context.sample_rate))  # in nanoseconds
    private = _element(0x63A2, bytes(context.extradata)) if context.extradata else b""
    names = _number(0xD7, 1) + _number(0x73C5, 1) + _number(0x83, 2) + _element(0x86, _CODECS[context.name])
    tracks = _element(0x1654AE6B, _element(0xAE, names + private + delay + sound))
    clock = _element(0x1549A966, _number(0x2AD7B1, 1_000_000))
    packet = _element(0xA3, b"\x81\0\0\x80" + bytes(8))  # a file without any cannot be opened
    head = _element(0x1A45DFA3, _element(0x4282, b"matroska") + _number(0x4287, 4) + _number(0x4285, 2))
    cluster = _element(0x1F43B675, _number(0xE7, 0) + packet)
    try:
        return av.open(BytesIO(head + _element(0x18538067, clock + tracks + cluster)))
    except av.FFmpegError:
        return None


def _element(name: int, data: bytes) -> bytes:
    return (
        name.to_bytes((name.bit_length() + 7) // 8, "big")
        + (0x10000000 | len(data)).to_bytes(4, "big")
        + data
    )


def _number(name: int, value: int) -> bytes:
    return _element(name, value.to_bytes(8, "big"))
