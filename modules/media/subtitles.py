"""Repack subtitles of text between files that hold text in different ways; styles are dropped."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from modules.media.ffmpeg import av

_TEXT = {"subrip", "srt", "ass", "ssa", "webvtt", "mov_text", "text"}
_ENCODERS = {".mkv": "srt", ".mp4": "mov_text", ".mov": "mov_text"}
_ASS_FIELDS = 8  # before the text: order, layer, style, name, three margins, effect
# what the encoders want to know of the looks of the text, before there is any
_HEADER = b"""[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize
Style: Default,Arial,16

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""


def is_text(stream: Any) -> bool:
    """Return whether a stream of subtitles is text that can be repacked; others are pictures."""
    return stream.codec_context is not None and stream.codec_context.name in _TEXT


def add_text(target: Any, source: Any, suffix: str) -> tuple[Any, Callable[[Any], Iterator[Any]]]:
    """Add a stream of text to a file with this suffix for the text of `source`, a stream of another file.

    Returns it, and a function from packets of `source` to packets to write.
    """
    stream = target.add_stream(_ENCODERS[suffix])
    stream.codec_context.subtitle_header = _HEADER
    stream.codec_context.time_base = source.time_base
    codec = source.codec_context.name

    def convert(packet: Any) -> Iterator[Any]:
        text = plain_text(bytes(packet), codec) if packet.size else ""
        if text:
            data = text.encode("utf-8")
            repacked = av.Packet(data if suffix == ".mkv" else len(data).to_bytes(2, "big") + data)
            repacked.time_base, repacked.duration = packet.time_base, packet.duration
            repacked.pts, repacked.dts = packet.pts, packet.dts
            repacked.is_keyframe = True
            yield repacked

    return stream, convert


def plain_text(data: bytes, codec: str) -> str:
    """Return the text of one packet of subtitles, without marks of style."""
    if codec == "mov_text":
        size = int.from_bytes(data[:2], "big")
        return data[2 : 2 + size].decode("utf-8", "replace").strip()
    text = data.decode("utf-8", "replace")
    if codec in ("ass", "ssa"):
        text = text.split(",", _ASS_FIELDS)[-1]
        text = re.sub(r"\{[^}]*\}", "", text).replace(r"\N", "\n").replace(r"\n", "\n").replace(r"\h", " ")
    else:
        text = re.sub(r"</?[a-zA-Z][^>]*>", "", text)
    return text.strip()
