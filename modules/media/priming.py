"""Tell Matroska that sound begins before time 0, with samples that only start the decoder.

MP4 has such packets at negative times. FFmpeg would move everything else behind them, unless the stream says
how many samples they are; PyAV gives such a stream only for a Matroska file. So one is made in memory.
"""

import struct
from io import BytesIO
from typing import Any

from modules.media.ffmpeg import av

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
