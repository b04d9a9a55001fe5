"""Convert an opened image to the colors that a viewer shows: sRGB, on white where it is transparent.

An image is converted in bands of rows, so that only some MiB are needed in addition to the decoded and the
returned pixels.

As in browsers, a color profile takes precedence, then a PNG's chunk sRGB, then gAMA and cHRM; EXIF's
color space is ignored.
"""

import functools
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

logger = logging.getLogger(__name__)

Frame = NDArray[np.uint8]  # H W C

# version of reading pixels, recorded in caches. 0: without transparency and color profiles; 1, or true: with
# these, without color codes of clips and AVIFs, and with non-square pixels of clips;
# 2: with all of these, without mirrored clips, and with frames of folders sorted as text
AS_SHOWN = 3
_ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "La", "RGBa"})
# Pillow's modes that count as gray when a profile is selected. Browsers apply RGB profiles to gray
# images too
_GRAY_MODES = frozenset({"1", "L", "LA", "La"})
_MAX_ROUNDING = 2  # of 255; sRGB profiles differ by up to this when converted to sRGB
_SRGB_LIKE_GAMMA = 2.2  # value of 1 / gAMA that browsers treat as the curve of sRGB
_GAMMA_TOLERANCE = 0.05  # maximum difference of gAMA * _SRGB_LIKE_GAMMA from 1
# x, y of white, red, green and blue of sRGB as cHRM states them (IEC 61966-2-1)
_SRGB_CHROMATICITIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
# codes of ITU-T H.273 (cICP and videos): primaries, and exponents as in gAMA. None stands for the curve of
# sRGB, which browsers also use for television curves
_CICP = "cicp"
_INVERTED = "inverted"
_PHOTOMETRIC = 262  # TIFF tag
_CHROMATICITIES = {
    1: _SRGB_CHROMATICITIES,
    9: (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    12: (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
_GAMMAS = {**dict.fromkeys((1, 6, 13, 14, 15)), 4: 1 / 2.2, 5: 1 / 2.8, 8: 1.0}
_UNSPECIFIED = 2
HDR = {16: "PQ", 18: "HLG"}
# Pillow's formats of animations; MPO photos have several images too, but are not animated
_ANIMATED_FORMATS = {"AVIF", "GIF", "PNG", "WEBP"}
_BOX_BYTES = 1 << 16  # bytes at the start of an AVIF file that are searched for its color box
_BAND_PIXELS = 1 << 18  # pixels converted at a time
_D50 = np.array([0.9642, 1.0, 0.8249])  # white point of profiles (ICC.1)
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


@dataclass(frozen=True)
class Colors:
    """Facts about the colors of an image or video file, such as transparency, HDR and conversion to sRGB."""

    is_transparent: bool  # whether any pixel is transparent
    is_converted: bool  # its colors differ from sRGB and are converted
    rejection: str | None = None  # reason why its profile is not used
    hdr: str | None = None  # "PQ" or "HLG"
    is_interlaced: bool = False
    by_codes: bool = False  # converted according to color codes of a clip or an AVIF
    is_square: bool = True  # whether its pixels are square
    is_animated: bool = False  # an image with several frames


@dataclass(frozen=True)
class _Profile:
    data: bytes
    mode: str  # mode of the image: "L", "RGB" or "CMYK"
    path: Path = field(compare=False)  # first image with the profile, for messages


class _ProfileTransform(NamedTuple):
    to_srgb: ImageCms.ImageCmsTransform | None  # None: the colors are in sRGB already, or it cannot be used
    rejection: str | None = None  # why the profile cannot be used


def apply_orientation(file: Image.Image) -> Image.Image:
    """Rotate and mirror an opened image in place, as its EXIF orientation says, and return it."""
    _correct_info(file)
    ImageOps.exif_transpose(file, in_place=True)  # in place, to save memory
    return file


def _correct_info(file: Image.Image) -> None:
    """Add to `file.info`, before the pixels are read, what Pillow ignores or misreads."""
    # These are the transparent color of a PNG, inverted gray of a TIFF, and color codes of a PNG or AVIF.
    transparent_color = file.info.get("transparency")
    if transparent_color is not None:
        file.info["transparency"] = _scale_transparent_color(file, transparent_color)
    if file.mode.startswith("I;16") and getattr(file, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
        file.info[_INVERTED] = True  # 0 is white, which Pillow handles only for 8 bits
    if file.format == "PNG":
        codes = _read_cicp(file)
    else:
        codes = _read_nclx(file) if file.format == "AVIF" else None
    if codes is not None:
        file.info[_CICP] = codes


def _scale_transparent_color(file: Image.Image, stored: Any) -> Any:
    """Return a PNG's transparent color scaled to 8 bits like the pixels; Pillow leaves it unscaled."""
    tile = getattr(file, "tile", None)
    pixel_format = str(tile[0][3]) if tile else ""  # Pillow's name of the stored pixel format
    if pixel_format == "RGB;16B":  # Pillow reads only the high bytes
        return tuple(value >> 8 for value in stored)
    # 2 bits are scaled by 255 / 3, 4 bits by 255 / 15
    factor = {"L;2": 85, "L;4": 17}.get(pixel_format, 1)
    return stored * factor if factor > 1 else stored


def shown_pixels(path: Path, image: Image.Image, alpha: bool) -> NDArray[np.uint8]:
    """Return the pixels on white, H W 3 RGB; with `alpha`, a transparent image as H W 4 instead.

    `image` comes from `apply_orientation`. `path` is for messages only.
    """
    image.load()  # loading may change the mode
    keeps_alpha = alpha and _may_be_transparent(image)
    pixels = np.empty((image.height, image.width, 4 if keeps_alpha else 3), np.uint8)
    for rows, band in split_bands(image):
        colors = _convert_to_srgb(path, band)
        opacity = _read_opacity(band)
        if opacity is None:
            pixels[rows] = colors
        elif keeps_alpha:
            pixels[rows, :, :3] = colors
            pixels[rows, :, 3] = opacity
        elif int(opacity.min()) == 255:  # nothing to blend
            pixels[rows] = colors
        else:
            pixels[rows] = _blend_rows(np.dstack([colors, opacity]))
    return pixels


def row_blocks(height: int, width: int) -> Iterator[slice]:
    """Yield slices of an image's rows that contain about 260,000 pixels each."""
    step = max(1, _BAND_PIXELS // max(width, 1))
    for top in range(0, height, step):
        yield slice(top, min(top + step, height))


def split_bands(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Yield bands of an image, each with its rows as a slice; the bands keep the image's metadata."""
    for rows in row_blocks(image.height, image.width):
        band = image.crop((0, rows.start, image.width, rows.stop))
        band.info = image.info
        yield rows, band


def coded_pixels(pixels: NDArray[np.uint8], frame: Any) -> NDArray[np.uint8]:
    """Convert the pixels of a decoded FFmpeg frame, H W 3 or 4, to sRGB."""
    transform = code_transform(frame)
    if transform is None:
        return pixels
    colors = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    return np.dstack([np.asarray(ImageCms.applyTransform(colors, transform)), pixels[..., 3:]])


def code_transform(frame: Any) -> ImageCms.ImageCmsTransform | None:
    """Return the transform to sRGB for a decoded frame of FFmpeg or for a stream's codec.

    Returns:
        None for HDR and unknown codes, and for the primaries of BT.709, which sRGB shares.
    """
    primaries, transfer = int(frame.color_primaries), int(frame.color_trc)
    transfer = 1 if transfer == _UNSPECIFIED else transfer
    if primaries not in _CHROMATICITIES or primaries == 1 or transfer not in _GAMMAS:
        return None
    content = _make_profile(_GAMMAS[transfer], _CHROMATICITIES[primaries])
    return None if content is None else _build_transform(_Profile(content, "RGB", Path())).to_srgb


def inspect_colors(path: Path, file: Image.Image) -> Colors:
    """Return facts about an opened image's colors; pixels are read only if it may be transparent."""
    _correct_info(file)
    profile = _find_profile(path, file)
    transform, rejection = _ProfileTransform(None) if profile is None else _build_transform(profile)
    is_converted = transform is not None or (profile is None and _make_curve(file.info) is not None)
    transfer = file.info.get(_CICP, (0, 0))[1]
    is_transparent = _may_be_transparent(file) and any(
        map(_has_clear_pixels, ((band for _, band in split_bands(file))))
    )
    by_codes = is_converted and file.format == "AVIF" and _CICP in file.info
    is_animated = file.format in _ANIMATED_FORMATS and bool(getattr(file, "is_animated", False))
    return Colors(
        is_transparent, is_converted, rejection, HDR.get(transfer), by_codes=by_codes, is_animated=is_animated
    )


def blend_on_white(frame: NDArray[Any]) -> NDArray[Any]:
    """Composite a frame with alpha, H W 4 in 8 or 16 bits, on white; return H W 3."""
    blended = np.empty((*frame.shape[:2], 3), frame.dtype)
    for rows in row_blocks(frame.shape[0], frame.shape[1]):
        blended[rows] = _blend_rows(frame[rows])
    return blended


def _blend_rows(frame: NDArray[Any]) -> NDArray[Any]:
    maximum = int(np.iinfo(frame.dtype).max)
    wide = np.uint16 if maximum == 255 else np.uint64
    alpha = frame[..., 3:].astype(wide)
    blended: NDArray[Any] = (
        (frame[..., :3] * alpha + maximum * (maximum - alpha) + maximum // 2) // maximum
    ).astype(frame.dtype)
    return blended


def _may_be_transparent(image: Image.Image) -> bool:
    return image.mode in _ALPHA_MODES or image.info.get("transparency") is not None


def _has_clear_pixels(image: Image.Image) -> bool:
    opacity = _read_opacity(image)
    return opacity is not None and int(opacity.min()) < 255


def _read_opacity(image: Image.Image) -> NDArray[np.uint8] | None:
    """Return the alpha value of each pixel, H W in 0..255; None if no pixel can be transparent."""
    key = image.info.get("transparency")
    if image.mode.startswith("I;16") and key is not None:
        return np.where(np.asarray(image) == key, 0, 255).astype(np.uint8)
    if not _may_be_transparent(image):
        return None
    return np.asarray(image.convert("RGBA"))[..., 3]


def _convert_to_srgb(path: Path, image: Image.Image) -> NDArray[np.uint8]:
    """Return the colors of an image as sRGB, H W 3, ignoring alpha."""
    # Its color profile or else its gamma curve converts them; colors with neither count as sRGB.
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit gray instead of scaling it
        info = image.info
        gray = (np.asarray(image) >> 8).astype(np.uint8)  # the upper 8 of 16 bits
        image = Image.fromarray(~gray if _INVERTED in info else gray)
        image.info = info
    profile = _find_profile(path, image)
    if profile is None:
        colors = _convert_mode(image, "RGB")
        curve = _make_curve(image.info)
        if curve is not None:
            colors = colors.point(curve * 3)  # the same curve for red, green and blue
        return np.array(colors)
    to_srgb = _build_transform(profile).to_srgb
    if to_srgb is None:
        return np.array(_convert_mode(image, "RGB"))
    return np.array(ImageCms.applyTransform(_convert_mode(image, profile.mode), to_srgb))


def _convert_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in {"La", "RGBa"}:  # premultiplied colors
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    elif image.mode == "P" and "transparency" in image.info:  # otherwise Pillow warns
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


# Color profiles


def _find_profile(path: Path, image: Image.Image) -> _Profile | None:
    """Return the color profile of an image; None if it has none."""
    # A profile made from known codes of the cICP chunk takes precedence, then the ICC profile, then a profile
    # made from the chunks cHRM and gAMA.
    if image.mode == "LAB":  # Pillow converts LAB to sRGB
        return None
    primaries, transfer = image.info.get(_CICP, (0, 0))
    content: bytes | None
    if primaries in _CHROMATICITIES and transfer in _GAMMAS:
        content = _make_profile(_GAMMAS[transfer], _CHROMATICITIES[primaries])
        return None if content is None else _Profile(content, "RGB", path)
    content = image.info.get("icc_profile")
    if content:
        return _Profile(content, _select_mode(image.mode, content), path)
    # the chunk cICP overrides cHRM and gAMA, even with codes that are unknown here
    chromaticities = None if transfer else image.info.get("chromaticity")
    gamma = _read_gamma(image.info)
    if (
        chromaticities is None
        or gamma is None
        or np.allclose(chromaticities, _SRGB_CHROMATICITIES, atol=2e-3)
    ):
        return None
    content = _make_profile(gamma, tuple(chromaticities))
    return None if content is None else _Profile(content, "RGB", path)


def _select_mode(mode: str, profile: bytes) -> str:
    """Return the Pillow mode (L, RGB or CMYK) that the pixels need before their ICC profile is applied."""
    is_gray = mode in _GRAY_MODES or mode.startswith("I;16")
    if is_gray and profile[16:20] != b"RGB ":
        return "L"
    return "CMYK" if mode == "CMYK" else "RGB"


@functools.lru_cache(maxsize=64)
def _build_transform(profile: _Profile) -> _ProfileTransform:
    """Return the transform from an ICC profile to sRGB; log once per profile why it cannot be used."""
    color_space = profile.data[16:20].decode("latin-1").strip()  # the profile's header names its color space
    mode = profile.mode
    if color_space != {"L": "GRAY"}.get(mode, mode):
        rejection = f"its color profile is for {color_space or 'nothing'}, its pixels are {mode}"
    else:
        try:
            source_profile = ImageCms.getOpenProfile(io.BytesIO(profile.data))
            transform = ImageCms.buildTransform(source_profile, ImageCms.createProfile("sRGB"), mode, "RGB")
            return _ProfileTransform(None if _is_identity(transform, mode) else transform)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
            rejection = f"its color profile cannot be used ({error})"
    logger.warning("%s: %s. Its values are treated as sRGB", profile.path, rejection)
    return _ProfileTransform(None, rejection)


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether a color transform changes sampled colors by no more than rounding."""
    if mode == "CMYK":
        return False
    if mode == "RGB":
        steps = np.linspace(0, 255, 18).astype(np.uint8)
        pixels = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 18, 3)
        expected = pixels
    else:
        pixels = np.arange(256, dtype=np.uint8)[None]
        expected = pixels[..., None]
    transformed = np.asarray(ImageCms.applyTransform(Image.fromarray(pixels), transform)).astype(int)
    return bool(abs(transformed - expected).max() <= _MAX_ROUNDING)


# Color chunks of PNG


def _read_gamma(info: dict[Any, Any]) -> float | None:
    """Return the exponent of a PNG's gAMA chunk; None without the chunk, or if another chunk overrides it."""
    gamma = info.get("gamma")
    return None if not gamma or gamma <= 0 or "srgb" in info or _CICP in info else float(gamma)


def _read_cicp(file: Image.Image) -> tuple[int, int] | None:
    """Return (primaries, transfer function) of a PNG's cICP chunk, which Pillow ignores; None without it."""
    stream: Any = getattr(file, "fp", None)
    if stream is None:  # its pixels have been read
        return None
    position = stream.tell()
    try:
        stream.seek(8)  # after the signature
        # a chunk: 4 bytes of length, 4 bytes of kind, content, 4 bytes of checksum
        while len(head := stream.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
            length = int.from_bytes(head[:4], "big")
            if head[4:] == b"cICP" and length == 4:
                content = stream.read(2)
                return (content[0], content[1]) if len(content) == 2 else None
            stream.seek(length + 4, io.SEEK_CUR)
    finally:
        stream.seek(position)
    return None


def _read_nclx(file: Image.Image) -> tuple[int, int] | None:
    """Return (primaries, transfer function) of an AVIF file, ignored by Pillow; None with an ICC profile."""
    stream: Any = getattr(file, "fp", None)
    if stream is None or file.info.get("icc_profile"):
        return None
    position = stream.tell()
    stream.seek(0)
    _, marker, codes = stream.read(_BOX_BYTES).partition(b"colrnclx")
    stream.seek(position)
    primaries = int.from_bytes(codes[:2], "big")
    transfer = int.from_bytes(codes[2:4], "big")
    if not marker:
        return None
    return primaries, 1 if transfer == _UNSPECIFIED else transfer


def _make_curve(info: dict[Any, Any]) -> list[int] | None:
    """Return a table from a PNG's 256 levels to sRGB by its gAMA chunk; None if it changes nothing."""
    gamma = _read_gamma(info)
    if gamma is None or abs(_SRGB_LIKE_GAMMA * gamma - 1) <= _GAMMA_TOLERANCE:
        return None
    light = (np.arange(256) / 255) ** (1 / gamma)
    levels = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    in_srgb: list[int] = np.rint(255 * levels).astype(int).tolist()
    return in_srgb


@functools.lru_cache(maxsize=64)
def _make_profile(gamma: float | None, chromaticities: tuple[float, ...]) -> bytes | None:
    """Make an ICC profile from a PNG's gamma (None: the sRGB curve) and its chromaticities."""
    # Source: ICC.1, 8.3.
    colorants = _make_colorants(chromaticities)
    if colorants is None:
        return None
    # parametric curves of ISO 15076-1: type 3 with the constants of sRGB, or type 0, a gamma alone
    if gamma is None:
        curve = b"para" + bytes(5) + b"\3" + bytes(2)
        curve += _encode_fixed([2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045])
    else:
        curve = b"para" + bytes(8) + _encode_fixed([1 / (gamma or 1)])
    tags = {b"wtpt": _encode_xyz(_D50)}
    for character, colorant in zip((b"r", b"g", b"b"), colorants.T, strict=True):
        tags[character + b"XYZ"] = _encode_xyz(colorant)
        tags[character + b"TRC"] = curve
    return _with_header(tags)


def _with_header(tags: dict[bytes, bytes]) -> bytes:
    """Return a display's ICC profile with these tags. Source: ISO 15076-1 (ICC.1), version 4."""
    start = 132 + 12 * len(tags)  # offset of the tags' contents, after the header and the tag table
    table, body = b"", b""
    for name, content in tags.items():
        position = start + len(body)
        table += name + _encode_number(position) + _encode_number(len(content))
        body += content
    head = _encode_number(start + len(body)) + bytes(4) + b"\x04\x20\x00\x00mntrRGB XYZ " + bytes(12)
    head += b"acsp" + bytes(28) + _encode_fixed(_D50)
    return head.ljust(128, b"\0") + _encode_number(len(tags)) + table + body


def _encode_number(number: int) -> bytes:
    return number.to_bytes(4, "big")


def _encode_xyz(values: Any) -> bytes:
    """Encode the content of an ICC tag of type XYZ."""
    return b"XYZ " + bytes(4) + _encode_fixed(values)


def _make_colorants(chromaticities: tuple[float, ...]) -> Any:
    """Return the primaries of a cHRM chunk as columns of XYZ under D50; None if they form no triangle."""
    x = np.array(chromaticities[0::2])
    y = np.array(chromaticities[1::2])
    if (y <= 0).any():
        return None
    white, *primaries = np.stack([x / y, np.ones(4), (1 - x - y) / y], -1)  # XYZ with Y = 1
    try:
        # scale the primaries so that their sum is white
        scales = np.linalg.solve(np.array(primaries).T, white)
        colorants = np.array(primaries).T * scales
        # adapt from this white to D50 in the cone responses of Bradford
        cone_ratios = _BRADFORD @ _D50 / (_BRADFORD @ white)
        return np.linalg.solve(_BRADFORD, cone_ratios[:, None] * (_BRADFORD @ colorants))
    except np.linalg.LinAlgError:
        return None


def _encode_fixed(values: Any) -> bytes:
    """Encode numbers as s15Fixed16Number of the ICC format."""
    return bytes(np.rint(np.asarray(values) * 65536).astype(">i4").tobytes())
