"""Pictures are bounded by what they become: few bytes for each pixel, of any mode, or a sentence."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from modules.errors import MediaError
from modules.limits import MAX_DECODED_BYTES, MAX_FRAME_BYTES, MAX_LONE_FRAME_BYTES
from modules.media import opening
from modules.media.colors import blend_on_white, row_blocks
from modules.media.opening import DECODED_BYTES, DECODER_BYTES, open_video
from modules.media.reading import read_image
from tests.commands import ROOT

ON_LINUX = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads the memory as Linux shows it"
)
SIDE = 2000
SIDEWAYS = 6  # of EXIF's orientation
SPARE = 2.0  # bytes for each pixel of this small size: bands, code that is loaded late


def write_images(folder: Path) -> dict[str, Path]:
    """Write a picture of each kind, by its name."""
    turned = Image.Exif()
    turned[0x0112] = SIDEWAYS
    kinds: dict[str, dict[str, Any]] = {
        **{f"{mode}.png": {} for mode in ("RGBA", "LA", "RGB", "L", "P", "1", "I;16")},
        "P-clear.png": {"transparency": 0},
        "RGB-clear.png": {"transparency": (0, 0, 0)},
        "RGBA-turned.png": {"exif": turned},
        **{f"{mode}.tif": {"compression": "tiff_deflate"} for mode in ("RGBA", "LA", "CMYK", "LAB")},
        "CMYK.jpg": {"progressive": True, "subsampling": 0},
        "RGB.jpg": {"progressive": True, "subsampling": 0},
        "RGBA.tga": {"compression": "tga_rle"},
        "P.gif": {},
        "RGBA.webp": {"lossless": True, "method": 0},
        "RGBA.jp2": {},
    }
    paths = {}
    for name, options in kinds.items():
        mode = name.partition(".")[0].partition("-")[0]
        paths[name] = folder / name
        Image.new(mode, (SIDE, SIDE)).save(paths[name], **options)
    return paths


@ON_LINUX
def test_a_picture_takes_few_bytes_for_each_pixel_in_every_mode(tmp_path: Path) -> None:
    paths = write_images(tmp_path)
    asked = [(way, name) for name in paths for way in ("read", "alpha")]
    asked += [(way, name) for name in ("RGBA.png", "P-clear.png", "LA.tif") for way in ("look", "mask")]
    script = ROOT / "tests" / "modules" / "media" / "memory_of_pictures.py"
    warm = f"read={paths['RGBA.png']}"
    words = [warm, *(f"{way}={paths[name]}" for way, name in asked)]
    done = subprocess.run(
        [sys.executable, str(script), str(SIDE * SIDE), *words], capture_output=True, text=True, check=True
    )
    taken = dict(zip(asked, map(float, done.stdout.split()[1:]), strict=True))
    maximum = {
        name: DECODER_BYTES.get(Image.open(path).format or "", DECODED_BYTES) for name, path in paths.items()
    }
    assert {key: value for key, value in taken.items() if value > maximum[key[1]] + SPARE} == {}
    assert taken["read", "RGBA.png"] > 4  # it is measured


def test_the_largest_picture_that_is_decoded_leaves_room_below_the_limit_of_pages() -> None:
    assert max(DECODED_BYTES, *DECODER_BYTES.values()) * 1e6 < MAX_DECODED_BYTES
    assert MAX_DECODED_BYTES < 2.0e9
    assert 17 * MAX_FRAME_BYTES < 2.0e9


def test_pictures_whose_decoders_hold_more_are_refused_at_smaller_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x.png", "x.webp", "x.jp2"):
        Image.new("RGBA", (40, 30)).save(tmp_path / name)
    monkeypatch.setattr(opening, "MAX_DECODED_BYTES", 40 * 30 * DECODED_BYTES)
    assert read_image(tmp_path / "x.png").shape == (30, 40, 3)
    for name in ("x.webp", "x.jp2"):
        with pytest.raises(MediaError, match=r"40 x 30 pixels as \w+, which takes .* Make the image smaller"):
            read_image(tmp_path / name)


def test_a_large_chunk_of_a_png_is_not_read_for_its_colours(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", (4, 4)).save(path)
    data = path.read_bytes()
    body = b"cICP" + bytes([9, 13, 0, 1])
    chunk = struct.pack(">I", 4) + body + struct.pack(">I", zlib.crc32(body))
    false = struct.pack(">I", 9) + b"cICP" + bytes(9) + struct.pack(">I", zlib.crc32(b"cICP" + bytes(9)))
    for content, expected in ((chunk, (9, 13)), (false, None), (b"", None)):
        path.write_bytes(data[:33] + content + data[33:])
        with opening.open_image(path) as image:
            from modules.media.colors import _read_cicp

            assert _read_cicp(image) == expected


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "I;16", "CMYK", "LAB"])
@pytest.mark.parametrize("alpha", [False, True])
def test_bands_give_the_pixels_of_the_whole(
    mode: str, alpha: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (37, 23, 4), np.uint8), "RGBA")
    path = tmp_path / ("x.tif" if mode in ("CMYK", "LAB") else "x.png")
    clear = {"transparency": 3} if mode in ("P", "L") else {}
    exif = Image.Exif()
    exif[0x0112] = SIDEWAYS
    if mode == "LAB":
        image = Image.frombytes("LAB", (23, 37), noise.convert("RGB").tobytes())
    elif mode == "I;16":
        image = Image.fromarray(random.integers(0, 65536, (37, 23)).astype(np.uint16))
    else:
        image = noise.convert("RGB").convert(mode) if mode in ("CMYK", "P") else noise.convert(mode)
    packed: dict[str, Any] = {"compression": "tiff_deflate"} if path.suffix == ".tif" else clear
    image.save(path, exif=exif, **packed)
    full = read_image(path, alpha)
    assert full.shape[:2] == (23, 37)

    monkeypatch.setattr("modules.media.colors._BAND_PIXELS", 60)

    np.testing.assert_array_equal(read_image(path, alpha), full)
    monkeypatch.setattr("modules.media.colors._BAND_PIXELS", 1)  # a row at a time
    np.testing.assert_array_equal(read_image(path, alpha), full)


def test_frames_are_laid_on_white_as_a_whole_would_be() -> None:
    frame = np.random.default_rng(1).integers(0, 256, (9, 7, 4), np.uint8)
    expected = np.rint((frame[..., :3] * (frame[..., 3:] / 255.0)) + 255.0 - frame[..., 3:])
    np.testing.assert_allclose(blend_on_white(frame).astype(float), expected, atol=0.51)
    assert [*row_blocks(3, 1 << 21)] == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert [*row_blocks(0, 5)] == []


@pytest.mark.parametrize(
    ("codec", "pixel_format", "maximum"),
    [("libx264", "yuv420p", MAX_FRAME_BYTES), ("prores_ks", "yuv422p10le", MAX_LONE_FRAME_BYTES)],
)
def test_clips_with_frames_that_decoders_cannot_hold_are_refused(
    codec: str, pixel_format: str, maximum: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.mov"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, 8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, pixel_format
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 64, 3), np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with open_video(path) as (_, opened):
        bits = opened.codec_context.format.padded_bits_per_pixel
    name = "MAX_FRAME_BYTES" if maximum == MAX_FRAME_BYTES else "MAX_LONE_FRAME_BYTES"
    monkeypatch.setattr(opening, name, 64 * 32 * bits // 8)
    with open_video(path):
        pass
    monkeypatch.setattr(opening, name, 64 * 32 * bits // 8 - 1)
    message = "frames of 64 x 32 pixels, 0 MB each .* Make the clip smaller"
    with pytest.raises(MediaError, match=message), open_video(path):
        pass
