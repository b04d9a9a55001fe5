"""Media files that attack or surprise a reader, and sources with many streams."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from modules.media.encoding import X264
from modules.media.writing import write_video

BRIGHT = 200  # of the secret, which no other file here has


def write_secret(folder: Path) -> None:
    """The same bright pictures as .mp4, .mov, .ts and numbered .png."""
    frames = [np.full((48, 64, 3), BRIGHT, np.uint8)] * 9
    write_video(folder / "secret.mp4", frames, 16, preset="ultrafast")
    write_stream(folder / "secret.mov", "mov", "libx264", frames)
    write_stream(folder / "secret.ts", "mpegts", "mpeg2video", frames)
    for number in range(1, 4):
        Image.fromarray(frames[0]).save(folder / f"secret{number}.png")


def write_stream(
    path: Path, container: str, codec: str, frames: list[np.ndarray], pixels: str = "yuv420p", **options: str
) -> None:
    """Encode frames in any container and codec that FFmpeg has."""
    with av.open(str(path), "w", format=container) as target:
        x264 = X264 if codec == "libx264" else {}
        stream = target.add_stream(codec, rate=25, options={**x264, **options})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        for frame in frames:
            target.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        target.mux(stream.encode())


def concat_script(folder: Path) -> Path:
    path = folder / "clip.mp4"
    path.write_text("ffconcat version 1.0\nfile secret.mp4\n", encoding="ascii")
    return path


def playlist(folder: Path, name: str = "clip.m3u8") -> Path:
    path = folder / name
    head = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n"
    path.write_text(head, encoding="ascii")
    return path


def pattern_of_names(folder: Path) -> Path:
    path = folder / "secret%d.png"
    path.write_bytes(b"not an image")
    return path


def session_description(folder: Path) -> Path:
    path = folder / "clip.mp4"
    head = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5000 RTP/AVP 32\n"
    path.write_text(head, encoding="ascii")
    return path


def external_references(folder: Path) -> Path:
    """A QuickTime file whose track lies in another file, by the alias record of its data reference."""
    content = bytearray((folder / "secret.mov").read_bytes())
    data = slice(content.index(b"mdat") + 4, content.index(b"moov") - 4)
    content[data] = bytes(data.stop - data.start)  # its own data are gone
    start = content.index(b"url ", content.index(b"dref")) - 4
    size = int.from_bytes(content[start : start + 4], "big")
    record = _alias(b"secret.mov", b"disk:folder:secret.mov")
    added = len(record) - size
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        place = content.index(box) - 4
        length = int.from_bytes(content[place : place + 4], "big") + added
        content[place : place + 4] = length.to_bytes(4, "big")
    content[start : start + size] = record
    path = folder / "clip.mov"
    path.write_bytes(content)
    return path


def _alias(name: bytes, place: bytes) -> bytes:
    """Source: libavformat/mov.c (mov_read_dref), Apple's QuickTime File Format, "Data Reference Atoms"."""
    body = bytes(4) + bytes(10) + bytes([4]) + b"disk".ljust(27, b"\0") + bytes(12) + bytes([len(name)])
    body += name.ljust(63, b"\0") + bytes(16) + (1).to_bytes(2, "big") * 2 + bytes(16)
    body += (2).to_bytes(2, "big") + len(place).to_bytes(2, "big") + place + b"\xff\xff\0\0"
    body = body.ljust(160, b"\0")
    return (8 + len(body)).to_bytes(4, "big") + b"alis" + body


REFERENCES = (
    *(concat_script, playlist, partial(playlist, name="clip.mp4"), session_description),
    *(pattern_of_names, external_references),
)


SIZE = (48, 64)  # height, width
AUDIO_RATE = 48_000
SUBTITLES = ("Erste Zeile, é漢", "Second line")
FONT = b"\0\1\0\0" + bytes(range(100))
ASS_HEADER = b"""[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize
Style: Default,Arial,16

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""


@dataclass(frozen=True)
class Source:
    """What a video has."""

    muxer: str = "matroska"
    rate: Fraction = Fraction(25)
    frames: int = 12
    times: Sequence[Fraction] | None = None  # seconds; at the rate without
    first: Fraction = Fraction(0)  # second of the first picture
    offset: str = "0"  # seconds by which the file's times are off
    audio: str | None = None  # encoder
    subtitles: str | None = None
    chapters: bool = False
    font: bool = False
    tags: tuple[tuple[str, str], ...] = ()
    options: tuple[tuple[str, str], ...] = ()  # of the muxer


def write_source(path: Path, source: Source) -> Path:
    """Write a video with gray pictures, each brighter than the one before."""
    options = dict(source.options) | {"output_ts_offset": source.offset}
    with av.open(str(path), "w", format=source.muxer, options=options) as target:
        video = target.add_stream("libx264", rate=source.rate, options={"preset": "ultrafast", **X264})
        video.height, video.width, video.pix_fmt = *SIZE, "yuv420p"
        unit = 1 / source.rate if source.times is None else Fraction(1, 90_000)
        video.codec_context.time_base = unit
        video.metadata["title"] = "Bild"
        audio = _add_audio(target, source.audio) if source.audio else None
        text = _add_subtitles(target, source.subtitles) if source.subtitles else None
        target.metadata.update(dict(source.tags))
        if source.font:
            target.add_attachment("schrift.ttf", "application/x-truetype-font", FONT)
        if source.chapters:
            target.set_chapters([_chapter(1, 0, 200, "Anfang"), _chapter(2, 200, 480, "Ende")])
        times = source.times or [index / source.rate + source.first for index in range(source.frames)]
        for index, time in enumerate(times):
            gray = np.full((*SIZE, 3), (10 * index + 20) % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(gray, format="rgb24")
            frame.pts, frame.time_base = round(time / unit), unit
            target.mux(video.encode(frame))
        target.mux(video.encode())
        if audio is not None:
            _write_audio(target, audio, len(times) / source.rate)
        if text is not None:
            _write_subtitles(target, text, source.subtitles)
    return path


def _chapter(number: int, start: int, end: int, title: str) -> dict[str, Any]:
    place = {"id": number, "start": start, "end": end, "time_base": Fraction(1, 1000)}
    return {**place, "metadata": {"title": title}}


def _add_audio(target: Any, encoder: str) -> Any:
    stream = target.add_stream(encoder, rate=AUDIO_RATE, options={"strict": "experimental"})
    stream.layout = "stereo"
    stream.metadata.update({"language": "deu", "title": "Ton"})
    return stream


def _write_audio(target: Any, stream: Any, seconds: Fraction) -> None:
    places = np.arange(round(seconds * AUDIO_RATE))
    tone = (np.sin(places * 440 * 2 * np.pi / AUDIO_RATE) * 8000).astype(np.int16)
    for start in range(0, len(tone), 4800):
        both = np.repeat(tone[start : start + 4800], 2)[None]
        frame = av.AudioFrame.from_ndarray(both, format="s16", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = AUDIO_RATE, start, Fraction(1, AUDIO_RATE)
        target.mux(stream.encode(frame))
    target.mux(stream.encode(None))


def _add_subtitles(target: Any, encoder: str) -> Any:
    stream = target.add_stream(encoder)
    stream.codec_context.subtitle_header = ASS_HEADER
    stream.codec_context.time_base = Fraction(1, 1000)
    stream.metadata["language"] = "eng"
    return stream


def _write_subtitles(target: Any, stream: Any, encoder: str | None) -> None:
    for number, line in enumerate(SUBTITLES):
        data = line.encode()
        if encoder == "mov_text":
            data = len(data).to_bytes(2, "big") + data
        elif encoder == "ass":
            data = f"{number},0,Default,,0,0,0,,{{\\i1}}{line}".encode()
        packet = av.Packet(data)
        packet.stream, packet.time_base = stream, Fraction(1, 1000)
        packet.pts = packet.dts = 100 + 200 * number
        packet.duration, packet.is_keyframe = 150, True
        target.mux(packet)


def packets(path: Path, kind: str) -> list[tuple[Fraction, bytes]]:
    """Return the second and the bytes of all packets of the first stream of a kind: audio, subtitle."""
    with av.open(str(path)) as container:
        stream = getattr(container.streams, kind)[0]
        found = [packet for packet in container.demux(stream) if packet.size]
        return [(packet.pts * packet.time_base, bytes(packet)) for packet in found]
