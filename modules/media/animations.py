"""Read animated GIF and WebP files: frames with transparency, and how long each one is shown.

Frame counts and durations come from the block headers, without decoding; Pillow decodes and applies the
disposal of frames. Every failure is a MediaError with the file and the reason.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from modules.errors import MediaError
from modules.media.opening import open_image, reading

ANIMATION_SUFFIXES = frozenset({".gif", ".webp"})
SHORTEST = 0.011  # seconds; browsers show frames that state less for USUAL, and so do their makers expect
USUAL = 0.1
_CUT = "is damaged or cut short: it ends before its last frame does"


def is_animation(path: Path) -> bool:
    """Return whether a file is a GIF or WebP, by its suffix, that has more than one frame.

    Reads block headers only, and no more of them than necessary. Raises MediaError if they are damaged or end
    early.
    """
    return path.suffix.lower() in ANIMATION_SUFFIXES and path.is_file() and len(_durations(path, most=2)) > 1


def animation_durations(path: Path) -> tuple[float, ...]:
    """Return the seconds that each frame is shown. Raises MediaError if the file is damaged or cut short."""
    return tuple(_durations(path))


def animation_frames(path: Path) -> Iterator[tuple[NDArray[np.uint8], float]]:
    """Yield each frame, H W 4 RGBA, and the seconds that it is shown.

    Raises MediaError if the file is damaged or cut short.
    """
    durations = _durations(path)
    with open_image(path) as image:
        for index, seconds in enumerate(durations):
            image.seek(index)
            yield np.array(image.convert("RGBA")), seconds


def blend_on_white(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return H W 3: a frame H W 4 over white."""
    alpha = frame[..., 3:].astype(np.uint16)
    return ((frame[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _durations(path: Path, most: int | None = None) -> list[float]:
    """Return the seconds of all frames, or of the first `most`; empty for a picture that is no animation."""
    with reading(path), path.open("rb") as file:
        start = file.read(6)
        found = _gif_durations if start[:4] == b"GIF8" else _webp_durations if start[:4] == b"RIFF" else None
        if found is None:
            return []
        durations: list[float] = []
        try:
            for seconds in found(file):
                durations.append(seconds if seconds >= SHORTEST else USUAL)
                if len(durations) == most:
                    break
        except EOFError:
            raise MediaError(f"{path} {_CUT}") from None
        return durations


def _gif_durations(file: BinaryIO) -> Iterator[float]:
    """Yield the seconds of each frame of a GIF from behind its first 6 bytes. EOFError: it is cut."""
    _skip_colours(file, _take(file, 7)[4])
    hundredths = 0
    while (kind := _take(file, 1)) != b";":
        if kind == b"!":
            label = _take(file, 1)
            size = _take(file, 1)[0]
            block = _take(file, size)
            if label == b"\xf9" and size >= 3:
                hundredths = int.from_bytes(block[1:3], "little")
            if size:
                _skip_blocks(file)
        elif kind == b",":
            _skip_colours(file, _take(file, 9)[8])
            _take(file, 1)  # size of the codes
            _skip_blocks(file)
            yield hundredths / 100
            hundredths = 0
        else:
            raise ValueError(f"a GIF block of an unknown kind, {kind.hex()}")


def _skip_colours(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        _take(file, 3 << (flags & 7) + 1)


def _skip_blocks(file: BinaryIO) -> None:
    while size := _take(file, 1)[0]:
        _take(file, size)


def _webp_durations(file: BinaryIO) -> Iterator[float]:
    """Yield the seconds of each frame of an animated WebP from behind its first 6 bytes."""
    _take(file, 6)  # the rest of the file's size, and WEBP
    while header := file.read(8):
        if len(header) < 8:
            raise EOFError
        size = int.from_bytes(header[4:], "little")
        content = _take(file, min(size, 16))
        if header[:4] == b"ANMF":
            yield int.from_bytes(content[12:15], "little") / 1000
        file.seek(size + size % 2 - len(content), 1)


def _take(file: BinaryIO, size: int) -> bytes:
    found = file.read(size)
    if len(found) < size:
        raise EOFError
    return found
