"""Media files of others: every container that people have is opened; no other file, nothing huge or
endless.
"""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from modules.errors import MediaError
from modules.media.reading import image_size, read_image, video_frames, video_info
from tests.modules.hostile_media import BRIGHT, REFERENCES, external_references, write_secret, write_stream

# name, FFmpeg's container, encoder, pixel format
CONTAINERS = (
    ("clip.mp4", "mp4", "libx264", "yuv420p"),
    ("clip.mov", "mov", "libx264", "yuv420p"),
    ("clip.mkv", "matroska", "libx264", "yuv420p"),
    ("clip.webm", "webm", "libvpx-vp9", "yuv420p"),
    ("clip.avi", "avi", "mpeg4", "yuv420p"),
    ("clip.gif", "gif", "gif", "rgb8"),
    ("clip.ts", "mpegts", "libx264", "yuv420p"),
    ("clip.mpg", "mpeg", "mpeg2video", "yuv420p"),
    ("clip.mpeg", "mpeg1video", "mpeg1video", "yuv420p"),
    ("clip.m4v", "ipod", "libx264", "yuv420p"),
    ("bare.m4v", "m4v", "mpeg4", "yuv420p"),
    ("clip.wmv", "asf", "wmv2", "yuv420p"),
    ("clip.flv", "flv", "flv", "yuv420p"),
    ("clip.ogv", "ogg", "libvpx", "yuv420p"),
    ("clip.3gp", "3gp", "mpeg4", "yuv420p"),
    ("clip.mxf", "mxf", "mpeg2video", "yuv420p"),
    ("clip.apng", "apng", "apng", "rgb24"),
    ("clip.y4m", "yuv4mpegpipe", "wrapped_avframe", "yuv420p"),
    ("clip.h264", "h264", "libx264", "yuv420p"),
    ("clip.mjpeg", "mjpeg", "mjpeg", "yuvj420p"),
)


@pytest.mark.parametrize(
    ("name", "container", "codec", "pixels"), CONTAINERS, ids=[row[0] for row in CONTAINERS]
)
def test_every_container_that_people_have_is_read(
    name: str, container: str, codec: str, pixels: str, tmp_path: Path
) -> None:
    frames = [np.full((48, 64, 3), BRIGHT, np.uint8)] * 5
    options = {"strict": "unofficial"} if codec == "mjpeg" else {}
    write_stream(tmp_path / name, container, codec, frames, pixels, **options)

    read = list(video_frames(tmp_path / name))

    assert len(read) == 5
    assert np.abs(np.stack(read).astype(float) - BRIGHT).mean() < 25  # GIF has few colours
    assert (video_info(tmp_path / name).width, video_info(tmp_path / name).height) == (64, 48)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
def test_a_picture_given_as_a_video_is_its_only_frame(suffix: str, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), (BRIGHT,) * 3).save(tmp_path / f"still{suffix}")

    assert [frame.shape for frame in video_frames(tmp_path / f"still{suffix}")] == [(48, 64, 3)]


@pytest.mark.parametrize("write", REFERENCES)
def test_a_file_that_refers_to_another_does_not_bring_it_in(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    write_secret(tmp_path)
    path = write(tmp_path)

    for read in (lambda: list(video_frames(path)), lambda: video_info(path)):
        with pytest.raises(MediaError) as refused:
            read()
        assert path.name in str(refused.value)


def test_the_external_reference_of_the_test_above_is_one_that_ffmpeg_could_follow(tmp_path: Path) -> None:
    write_secret(tmp_path)

    with av.open(str(external_references(tmp_path)), options={"enable_drefs": "1"}) as container:
        assert len(list(container.decode(video=0))) == 9


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"], ids=["PostScript"]
)
def test_a_picture_that_is_a_program_is_no_picture(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(content)

    with pytest.raises(MediaError, match=r"picture\.png is no image that can be read"):
        image_size(tmp_path / "picture.png")


def write_huge_png(path: Path, width: int, height: int) -> None:
    """A few bytes that say they are a picture of that size."""
    chunks = (
        b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(bytes(99)),
    )
    whole = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(whole))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(13_000, 13_000), (60_000, 60_000), (1, 200_000_000)])
@pytest.mark.parametrize("read", [read_image, image_size])
def test_a_picture_of_too_many_pixels_is_refused_by_its_header(
    read: Callable[[Path], object], width: int, height: int, tmp_path: Path
) -> None:
    write_huge_png(tmp_path / "huge.png", width, height)

    with pytest.raises(MediaError, match=r"huge\.png has .*the picture smaller") as refused:
        read(tmp_path / "huge.png")

    assert "134 million" in str(refused.value)


def test_a_video_of_too_many_pixels_is_refused_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "huge.y4m").write_bytes(b"YUV4MPEG2 W13000 H13000 F25:1 C420jpeg\nFRAME\n")

    with pytest.raises(MediaError, match=r"huge\.y4m has 13000 x 13000 pixels, 169 million"):
        list(video_frames(tmp_path / "huge.y4m"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("read", [read_image, image_size, video_info, lambda path: list(video_frames(path))])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_refused_at_once(
    kind: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "endless.png"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")

    with pytest.raises(
        MediaError, match=rf"endless\.png cannot be read: it is a (named )?{kind}, not a regular file"
    ):
        read(path)


def test_a_link_to_a_picture_is_followed(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "picture.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "picture.png")

    assert image_size(tmp_path / "link.png") == (64, 48)


def test_a_header_that_claims_more_frames_than_the_file_has_bytes_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "clip.avi"
    write_stream(path, "avi", "mpeg4", [np.full((48, 64, 3), BRIGHT, np.uint8)] * 5)
    assert video_info(path).frames == 5

    content = bytearray(path.read_bytes())
    length = content.index(b"strh") + 8 + 32  # of the stream, in frames
    content[length : length + 4] = (2**31 - 1).to_bytes(4, "little")
    path.write_bytes(content)

    assert video_info(path).frames is None
    assert len(list(video_frames(path))) == 5
