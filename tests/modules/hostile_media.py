"""Media files that refer to a second file instead of holding pixels.

Each function returns the path to open.
"""

from pathlib import Path

import av
import numpy as np
from PIL import Image

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
        stream = target.add_stream(codec, rate=25, options=options)
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


def playlist_named_mp4(folder: Path) -> Path:
    return playlist(folder, "clip.mp4")


def pattern_of_names(folder: Path) -> Path:
    path = folder / "secret%d.png"
    path.write_bytes(b"not a picture")
    return path


def session_description(folder: Path) -> Path:
    path = folder / "clip.mp4"
    path.write_text(
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5000 RTP/AVP 32\n",
        encoding="ascii",
    )
    return path


def external_references(folder: Path) -> Path:
    """A QuickTime file whose track lies in another file, by the alias record of its data reference."""
    content = bytearray((folder / "secret.mov").read_bytes())
    content[content.index(b"mdat") + 4 : content.index(b"moov") - 4] = bytes(
        content.index(b"moov") - content.index(b"mdat") - 8
    )  # its own data are gone
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
    *(concat_script, playlist, playlist_named_mp4, session_description),
    *(pattern_of_names, external_references),
)
