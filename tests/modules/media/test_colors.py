"""Pictures as a viewer shows them: transparency on white, color profiles, what PNGs say, masks, clips."""

import logging
import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from modules.errors import MediaError
from modules.media.pixels import video_pixels
from modules.media.reading import (
    frame_size,
    image_size,
    image_suffixes,
    media_colors,
    read_image,
    read_mask,
    video_frames,
)
from modules.media.streams import shown_frames

RAMP = np.stack(np.meshgrid(np.arange(0, 256, 17), np.arange(0, 256, 17)), -1).astype(np.uint8)  # 16 16 2
COLOURS = np.dstack([RAMP, 255 - RAMP[..., :1]])
ALPHA = np.tile(np.array([0, 64, 128, 255], np.uint8), (16, 4))
XYZ_OF_SRGB = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
XYZ_OF_P3 = np.array([[0.4866, 0.2657, 0.1982], [0.2290, 0.6917, 0.0793], [0.0, 0.0451, 1.0439]])
XYZ_OF_ADOBE = np.array([[0.5767, 0.1856, 0.1882], [0.2973, 0.6274, 0.0753], [0.0270, 0.0707, 0.9911]])
XYZ_OF_2020 = np.array([[0.6370, 0.1446, 0.1689], [0.2627, 0.6780, 0.0593], [0.0, 0.0281, 1.0610]])
TO_D50 = np.array([[1.0479, 0.0229, -0.0502], [0.0296, 0.9904, -0.0171], [-0.0092, 0.0151, 0.7519]])
SRGB_PLACES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
P3_PLACES = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)


def png(path: Path, bits: int, kind: int, rows: bytes, side: int = 16, **chunks: bytes) -> Path:
    """Write a PNG of `side` rows; kind: its color type. chunks: in front of the pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    step = len(rows) // side
    lines = b"".join(b"\0" + rows[at : at + step] for at in range(0, len(rows), step))
    head = struct.pack(">IIBBBBB", side, side, bits, kind, 0, 0, 0)
    middle = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    parts = chunk(b"IHDR", head) + middle + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


def profile(space: bytes, **tags: bytes) -> bytes:
    """An ICC profile of a display, with these tags (ICC.1:2010, 7)."""
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name.encode(), 132 + 12 * len(tags) + len(body), len(data))
        body += data
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    pcs = b"Lab " if space == b"CMYK" else b"XYZ "
    white = struct.pack(">3i", 63190, 65536, 54061)
    head = b"\x02\x20\0\0" + kind + space + pcs + bytes(12) + b"acsp" + bytes(28) + white + bytes(48)
    return struct.pack(">I", 128 + len(table) + len(body)) + bytes(4) + head + table + body


def xyz(values: Any) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * float(value)) for value in values))


def gamma_curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma)) + bytes(2)


def srgb_curve() -> bytes:
    values = np.rint(65535 * linear(np.arange(1024) / 1023)).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", 1024) + values.tobytes()


def matrix_profile(to_xyz: np.ndarray, curve: bytes) -> bytes:
    columns = {f"{one}XYZ": xyz(column) for one, column in zip("rgb", (TO_D50 @ to_xyz).T, strict=True)}
    return profile(b"RGB ", wtpt=xyz((0.9642, 1, 0.8249)), **columns, **{f"{one}TRC": curve for one in "rgb"})


def linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encode(values: np.ndarray) -> np.ndarray:
    """Light 0..1 as sRGB 0..255 (IEC 61966-2-1)."""
    values = np.clip(values, 0, 1)
    return 255 * np.where(values <= 0.0031308, 12.92 * values, 1.055 * values ** (1 / 2.4) - 0.055)


def converted(colors: np.ndarray, to_xyz: np.ndarray, gamma: float | None) -> np.ndarray:
    light = linear(colors / 255) if gamma is None else (colors / 255) ** gamma
    return encode(light @ (np.linalg.inv(XYZ_OF_SRGB) @ to_xyz).T)


def on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.rint(colors * share + 255 * (1 - share))


def nearly(found: np.ndarray, right: np.ndarray, levels: float) -> None:
    assert found.shape == right.shape
    assert np.abs(found - right).max() <= levels


def transparent(kind: str, path: Path) -> tuple[Path, np.ndarray]:
    """A transparent picture of a kind, and what it is on white."""
    gray, both = COLOURS[..., 0], np.dstack([COLOURS, ALPHA])
    grays = np.repeat(gray[..., None], 3, axis=2)
    keyed = np.where(gray[..., None] == 0x33, 255, grays)
    wide = (both.astype(np.uint16) << 8 | 7).astype(">u2")
    if kind == "palette":
        levels = bytes(range(0, 256, 17))
        shades = b"".join(bytes([value] * 3) for value in levels)
        path = png(path, 8, 3, (gray // 17).tobytes(), PLTE=shades, tRNS=levels)
        return path, on_white(grays, gray)
    if kind == "one color of a palette":
        shades = b"".join(bytes([value] * 3) for value in range(0, 256, 17))
        return png(path, 4, 3, packed(gray // 17, 4), PLTE=shades, tRNS=b"\xff\xff\xff\x00"), keyed
    if kind == "RGB with a key":
        key = struct.pack(">3H", 0x33, 0x33, 0xFF - 0x33)
        right = COLOURS.copy()
        right[3, 3] = 255
        return png(path, 8, 2, COLOURS.tobytes(), tRNS=key), right
    if kind == "16 bit RGB with a key":
        key = struct.pack(">3H", 0x3307, 0x3307, 0xCC07)
        right = COLOURS.copy()
        right[3, 3] = 255
        return png(path, 16, 2, wide[..., :3].tobytes(), tRNS=key), right
    if kind == "16 bit gray with a key":
        return png(path, 16, 0, wide[..., 0].tobytes(), tRNS=b"\x33\x07"), keyed
    if kind in {"4 bit", "2 bit", "1 bit"}:
        bits = int(kind[0])
        values = gray // 17 >> 4 - bits
        right = np.repeat((values * (255 // (2**bits - 1)))[..., None], 3, axis=2)
        right[values == 1] = 255
        return png(path, bits, 0, packed(values, bits), tRNS=b"\0\1"), right
    if kind == "16 bit RGBA":
        return png(path, 16, 6, wide.tobytes()), on_white(COLOURS, ALPHA)
    if kind == "16 bit gray with alpha":
        return png(path, 16, 4, wide[..., [0, 3]].tobytes()), on_white(grays, ALPHA)
    if kind == "LA":
        Image.fromarray(both[..., [0, 3]]).save(path)
        return path, on_white(grays, ALPHA)
    path = path.with_suffix(kind)
    Image.fromarray(both).save(path, **{".webp": {"lossless": True, "exact": True}}.get(kind, {}))
    return path, on_white(COLOURS, ALPHA)


def packed(values: np.ndarray, bits: int) -> bytes:
    digits = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
    return np.packbits(digits.reshape(16, -1), axis=-1).tobytes()


@pytest.mark.parametrize(
    "kind",
    [
        *(".png", ".webp", ".tif", "LA", "palette", "one color of a palette", "RGB with a key"),
        *("16 bit RGBA", "16 bit gray with alpha", "16 bit RGB with a key", "16 bit gray with a key"),
        *("4 bit", "2 bit", "1 bit"),
    ],
)
def test_what_is_transparent_is_white(tmp_path: Path, kind: str) -> None:
    path, right = transparent(kind, tmp_path / "a.png")

    np.testing.assert_array_equal(read_image(path), right)
    assert read_image(path, alpha=True).shape == (16, 16, 4)
    assert media_colors(path).is_transparent
    if kind == ".png":
        np.testing.assert_array_equal(read_image(path, alpha=True)[..., :3], COLOURS)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("name", ["P3", "Adobe RGB"])
def test_colors_of_a_profile_become_srgb(tmp_path: Path, name: str, suffix: str) -> None:
    path, side = tmp_path / f"a{suffix}", (0 if suffix != ".jpg" else 6)
    to_xyz, gamma = (XYZ_OF_P3, None) if name == "P3" else (XYZ_OF_ADOBE, 563 / 256)
    data = matrix_profile(to_xyz, srgb_curve() if gamma is None else gamma_curve(gamma))
    flat = np.full_like(COLOURS, (200, 120, 90)) if side else COLOURS
    how = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(flat).save(path, icc_profile=data, **how)

    found = read_image(path)

    nearly(found, converted(flat, to_xyz, gamma), 3 if side else 1.5)
    assert np.abs(found.astype(int) - flat).max() > 10
    assert media_colors(path).is_converted


def test_profiles_of_palettes_of_transparent_grey_and_of_cmyk_pictures_count(tmp_path: Path) -> None:
    p3 = matrix_profile(XYZ_OF_P3, srgb_curve())
    Image.fromarray(np.dstack([COLOURS, ALPHA])).save(tmp_path / "a.png", icc_profile=p3)
    nearly(read_image(tmp_path / "a.png"), on_white(np.rint(converted(COLOURS, XYZ_OF_P3, None)), ALPHA), 1.5)
    Image.new("RGB", (16, 16), (200, 30, 60)).quantize(4).save(tmp_path / "p.png", icc_profile=p3)
    nearly(read_image(tmp_path / "p.png")[0, 0], converted(np.array([200, 30, 60]), XYZ_OF_P3, None), 1.5)

    white = xyz((0.9642, 1, 0.8249))
    gray = profile(b"GRAY", wtpt=white, kTRC=gamma_curve(1))
    right = encode(COLOURS[..., 0] / 255)
    for mode in ("L", "LA", "I;16"):
        image = Image.fromarray(COLOURS[..., 0])
        if mode == "I;16":
            image = Image.fromarray(COLOURS[..., 0].astype(np.uint16) << 8)
        (image.convert("LA") if mode == "LA" else image).save(tmp_path / "g.png", icc_profile=gray)
        nearly(read_image(tmp_path / "g.png")[..., 1], right, 1.5)
    Image.fromarray(COLOURS[..., 0]).save(
        tmp_path / "g.png", icc_profile=matrix_profile(XYZ_OF_P3, gamma_curve(1))
    )
    nearly(read_image(tmp_path / "g.png")[..., 1], right, 1.5)  # one of RGB for a gray picture

    # a table of two places an ink: the first ink alone is L 80 a 0 b 40, all else black
    inks = np.zeros((16, 3), np.uint8)
    inks[:, 1:] = 128
    inks[8] = (204, 128, 168)
    ramp = bytes(range(256))
    table = (
        b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).ravel())
    )
    table += ramp * 4 + inks.tobytes() + ramp * 3
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(
        tmp_path / "c.tif", icc_profile=profile(b"CMYK", wtpt=white, A2B0=table)
    )
    lab = np.array([(80 + 16) / 116] * 3) + np.array([0, 0, -40 / 200])
    light = np.array([0.9642, 1, 0.8249]) * lab**3
    nearly(read_image(tmp_path / "c.tif")[0, 0], encode(np.linalg.inv(TO_D50 @ XYZ_OF_SRGB) @ light), 3)


@pytest.mark.parametrize("kind", ["sRGB", "broken", "of another kind", "EXIF says Adobe RGB"])
def test_what_browsers_do_not_convert_keeps_its_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    exif = Image.Exif()
    data = {
        "sRGB": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        "broken": matrix_profile(XYZ_OF_P3, srgb_curve())[:200],
        "of another kind": profile(b"GRAY", wtpt=xyz((0.9642, 1, 0.8249)), kTRC=gamma_curve(1)),
    }.get(kind)
    if data is None:
        exif.get_ifd(0x8769)[0xA001] = 2
    for name in ("a.png", "b.png"):
        Image.fromarray(COLOURS).save(tmp_path / name, icc_profile=data, exif=exif)
        np.testing.assert_array_equal(read_image(tmp_path / name), COLOURS)

    colors = media_colors(tmp_path / "a.png")
    told = [one.getMessage() for one in caplog.records]
    assert not colors.is_converted
    if kind in ("broken", "of another kind"):
        assert len(told) == 1  # of both files
        assert str(colors.rejection) in told[0]
        assert "color profile" in told[0]
    else:
        assert (told, colors.rejection) == ([], None)


def hundred_thousandths(values: Sequence[float]) -> bytes:
    return struct.pack(f">{len(values)}I", *(round(100_000 * value) for value in values))


@pytest.mark.parametrize(
    ("chunks", "right"),
    [
        ({"gAMA": (1.0,)}, converted(COLOURS, XYZ_OF_SRGB, 1.0)),
        ({"gAMA": (1 / 1.8,), "cHRM": SRGB_PLACES}, converted(COLOURS, XYZ_OF_SRGB, 1.8)),
        ({"gAMA": (0.45455,)}, COLOURS),
        ({"gAMA": (0.45455,), "cHRM": SRGB_PLACES}, COLOURS),
        ({"cHRM": P3_PLACES}, COLOURS),
        ({"gAMA": (0.45455,), "cHRM": P3_PLACES}, converted(COLOURS, XYZ_OF_P3, 2.2)),
        ({"sRGB": None, "gAMA": (1.0,), "cHRM": P3_PLACES}, COLOURS),
        ({"gAMA": (0.45455,), "cHRM": (0.3, 0.0) * 4}, COLOURS),
        ({"cICP": b"\x0c\x0d\0\1", "gAMA": (1.0,)}, converted(COLOURS, XYZ_OF_P3, None)),
        ({"cICP": b"\x01\x0d\0\1", "cHRM": P3_PLACES, "gAMA": (0.45455,)}, COLOURS),
    ],
)
def test_gamma_and_places_of_a_png_count_as_in_browsers(
    tmp_path: Path, chunks: dict[str, Any], right: np.ndarray
) -> None:
    data = {
        name: one or b"\0" if not isinstance(one, tuple) else hundred_thousandths(one)
        for name, one in chunks.items()
    }
    path = png(tmp_path / "a.png", 8, 2, COLOURS.tobytes(), **data)

    nearly(read_image(path), right, 0 if right is COLOURS else 1.5)
    assert media_colors(path).is_converted == (right is not COLOURS)


@pytest.mark.parametrize("kind", ["16 bits", "with alpha", "grey", "white is 0", "CMYK", "LAB", "floats"])
def test_a_tiff_is_what_a_viewer_shows(tmp_path: Path, kind: str) -> None:
    path, wide = tmp_path / "a.tif", COLOURS.astype(np.uint16) * 257
    grays = np.repeat(COLOURS[..., :1], 3, 2)
    if kind in ("16 bits", "with alpha"):
        half = np.full((*wide.shape[:2], 1), 32768, np.uint16)
        cv2.imwrite(
            str(path), np.dstack([wide[..., ::-1], half]) if kind == "with alpha" else wide[..., ::-1]
        )
        half_white = on_white(COLOURS, np.full(COLOURS.shape[:2], 128))
        nearly(read_image(path), half_white if kind == "with alpha" else COLOURS, int(kind == "with alpha"))
    elif kind in ("grey", "white is 0"):
        is_gray = kind == "grey"
        Image.fromarray(wide[..., 0]).save(path, tiffinfo={262: int(is_gray)})
        nearly(read_image(path), grays if is_gray else 255 - grays, 0)
    elif kind == "CMYK":
        inks = np.dstack([COLOURS, np.full(COLOURS.shape[:2], 51, np.uint8)])
        Image.fromarray(inks, mode="CMYK").save(path, compression="tiff_lzw")
        nearly(read_image(path), (255.0 - COLOURS) * 204 / 255, 1)
    elif kind == "LAB":  # L* of 50.2 is 18.6 % of the light
        Image.new("LAB", (4, 4), (128, 128, 128)).save(path)
        nearly(read_image(path), np.full((4, 4, 3), encode(np.array(0.1855))), 2)
    else:
        Image.fromarray(grays[..., 0] / np.float32(255)).save(path)
        for read in (read_image, image_size):  # `--check` reads headers
            with pytest.raises(MediaError, match=r"32-bit values .* Convert it to PNG"):
                read(path)


def drawn(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A mask of a kind, H W 4, and what it is."""
    image = np.zeros((16, 16, 4), np.uint8)
    image[..., 3] = ALPHA
    if kind == "white on nothing":
        image[ALPHA > 0, :3] = 255
    elif kind == "black and white":
        image[:8, :, :3] = 255
        return image, on_white(image[..., :3], ALPHA)[..., 0]
    elif kind == "opaque":
        image[..., 3], image[4:] = 255, 255
        return image, image[..., 0]
    return image, ALPHA


@pytest.mark.parametrize("kind", ["black on nothing", "white on nothing", "black and white", "opaque"])
def test_a_mask_drawn_by_transparency_is_what_is_opaque(tmp_path: Path, kind: str) -> None:
    image, right = drawn(kind)
    Image.fromarray(image).save(tmp_path / "a.png")

    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), np.repeat(right[..., None], 3, axis=2))


def encode_clip(path: Path, codec: str, kind: str, pixels: np.ndarray, **facts: Any) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options={"lossless": "1"} if "vp9" in codec else {})
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = kind
        for name, value in facts.items():
            setattr(stream.codec_context, name, value)
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[2] == 4 else "rgb24")
            container.mux(stream.encode(frame.reformat(format=kind)))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "codec", "kind", "is_white"),
    [
        ("a.webm", "libvpx-vp9", "yuva420p", True),
        ("a.mov", "prores_ks", "yuva444p10le", True),
        ("a.mkv", "ffv1", "bgra", True),
        ("a.avi", "rawvideo", "bgra", False),
    ],
)
def test_clips_are_laid_on_white(tmp_path: Path, name: str, codec: str, kind: str, is_white: bool) -> None:
    pixels = np.full((64, 64, 4), (200, 100, 50, 255), np.uint8)
    pixels[:32, :, 3], pixels[32:48, :, 3] = 0, 128
    path = encode_clip(tmp_path / name, codec, kind, pixels)
    right = on_white(pixels[..., :3], pixels[..., 3]) if is_white else pixels[..., :3]

    for frame in (next(video_frames(path)), next(shown_frames(path)).pixels):
        nearly(frame[4:-4:8], right[4:-4:8], 0 if "ffv1" in codec or not is_white else 4)
    assert media_colors(path).is_transparent == is_white


def test_folders_of_transparent_pictures_are_clips_on_white_and_hdr_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "clip").mkdir()
    for number in range(2):
        Image.fromarray(np.dstack([COLOURS, ALPHA])).save(tmp_path / "clip" / f"{number}.png")
    for frame in video_frames(tmp_path / "clip"):
        np.testing.assert_array_equal(frame, on_white(COLOURS, ALPHA))
    assert media_colors(tmp_path / "clip").is_transparent

    gray = np.full((64, 64, 3), 128, np.uint8)
    for number, code in ((0, 16), (1, 18), (2, 1)):
        path = encode_clip(tmp_path / f"{number}.mkv", "ffv1", "yuv420p", gray, color_trc=code)
        assert media_colors(path).hdr == {16: "PQ", 18: "HLG"}.get(code)
        caplog.clear()
        video_pixels(path, "--control_path", 64, 64, 1)
        assert ("is HDR" in caplog.text) == (code != 1)
        path = png(tmp_path / "a.png", 8, 2, COLOURS.tobytes(), cICP=bytes([9, code, 0, 1]))
        assert media_colors(path).hdr == {16: "PQ", 18: "HLG"}.get(code)


def test_nothing_is_said_of_plain_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for mode in ("RGB", "L", "P", "1", "CMYK", "RGBA"):
        path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
        image = Image.fromarray(COLOURS).convert(mode)
        image.save(path)
        with caplog.at_level(logging.INFO):
            np.testing.assert_array_equal(read_image(path), np.array(image.convert("RGB")))
        colors = media_colors(path)
        assert (colors.is_transparent, colors.is_converted, caplog.records) == (False, False, [])


@pytest.mark.skipif(".avif" not in image_suffixes(), reason="this Pillow reads no AVIF")
@pytest.mark.parametrize(("codes", "to_xyz"), [((12, 13), XYZ_OF_P3), ((1, 13), None), ((2, 2), None)])
def test_colors_that_an_avif_names_by_codes_become_srgb(
    tmp_path: Path, codes: tuple[int, int], to_xyz: np.ndarray | None
) -> None:
    path, color = tmp_path / "x.avif", np.array([200, 120, 90])
    Image.new("RGB", (64, 64), tuple(color.tolist())).save(path, quality=100, subsampling="4:4:4")
    before, box, rest = path.read_bytes().partition(b"colrnclx")
    path.write_bytes(before + box + struct.pack(">HH", *codes) + rest[4:])

    expected = color if to_xyz is None else converted(color, to_xyz, None)
    np.testing.assert_allclose(read_image(path)[5, 5], expected, atol=2)
    assert media_colors(path).is_converted == (to_xyz is not None)


@pytest.mark.parametrize(
    ("codes", "to_xyz"), [((12, 1), XYZ_OF_P3), ((9, 14), XYZ_OF_2020), ((1, 1), None), ((9, 16), None)]
)
def test_wide_colours_of_clips_become_srgb(
    tmp_path: Path, codes: tuple[int, int], to_xyz: np.ndarray | None
) -> None:
    path, color = tmp_path / "x.mkv", np.array([200, 120, 90])
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "bgr0"
        stream.codec_context.color_primaries, stream.codec_context.color_trc = codes
        frame: Any = av.VideoFrame.from_ndarray(np.full((32, 32, 3), color, np.uint8), format="rgb24")
        frame = frame.reformat(format="bgr0")
        frame.color_primaries, frame.color_trc = codes
        file.mux(stream.encode(frame))
        file.mux(stream.encode())

    expected = color if to_xyz is None else converted(color, to_xyz, None)
    np.testing.assert_allclose(next(video_frames(path))[5, 5], expected, atol=2)
    assert media_colors(path).is_converted == (to_xyz is not None)


@pytest.mark.parametrize("ratio", [Fraction(2), Fraction(1, 2), Fraction(1001, 1000)])
def test_pixels_of_clips_are_made_square(tmp_path: Path, ratio: Fraction) -> None:
    path = tmp_path / "x.mp4"
    half = np.zeros((32, 64, 3), np.uint8)
    half[:, :16] = 255
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=8, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv444p"
        stream.codec_context.sample_aspect_ratio = ratio
        file.mux(stream.encode(av.VideoFrame.from_ndarray(half, format="rgb24")))
        file.mux(stream.encode())

    width = 64 if 0.9 < ratio < 1.1 else round(64 * ratio)
    frame = next(video_frames(path))
    assert frame_size(path) == (width, 32) == frame.shape[1::-1]
    assert abs(float(frame.mean()) - 255 / 4) < 3
    assert frame[:, : width // 5].min() > 240


@pytest.mark.parametrize("params", ["tff=1:interlaced=1", "b-pyramid=none"])
def test_interlaced_clips_are_told(tmp_path: Path, params: str) -> None:
    gray, options = np.full((64, 64, 3), 9, np.uint8), {"x264-params": params}
    path = encode_clip(tmp_path / "x.mp4", "libx264", "yuv420p", gray, options=options)
    assert media_colors(path).is_interlaced == ("tff" in params)
