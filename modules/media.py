"""Images and videos on disk <-> uint8 frames: the only place that reads or writes either.

A frame is `H W C` uint8 RGB (C = 4 with alpha); sizes are (width, height). A "video" may also be a folder of images, its frames in
name order. Colours are converted by what the file says of itself. Every failure is a MediaError naming the file and the reason.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modules.buckets import Size

Frame = NDArray[np.uint8]  # H W C

VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg"})  # lower case


@dataclass(frozen=True)
class VideoInfo:
    """What the header says; None where it does not."""

    width: int
    height: int
    frames: int | None
    fps: float | None


def image_suffixes() -> frozenset[str]:
    """Image suffixes that can be read here, lower case; .avif and .jxl only where Pillow can decode them."""
    raise NotImplementedError


def read_image(path: Path, alpha: bool = False) -> Frame:
    """H W 3 RGB, upright; with `alpha`, H W 4 where the image has transparency. Raises MediaError."""
    raise NotImplementedError


def image_size(path: Path) -> Size:
    """Width and height of the upright image, from the header alone. Raises MediaError."""
    raise NotImplementedError


def video_frames(path: Path) -> Iterator[Frame]:
    """All frames in playing order, H W 3, one at a time; of a file that FFmpeg reads or of a folder of images. Raises MediaError."""
    raise NotImplementedError


def video_info(path: Path) -> VideoInfo:
    """Size, number of frames and rate from the header (of a folder: its first image and its count). Raises MediaError."""
    raise NotImplementedError


def resize_cover(frame: Frame, bucket: Size) -> Frame:
    """Resize a frame until it covers `bucket`, crop the centre. Lanczos when enlarging, else area average."""
    raise NotImplementedError


def write_video(
    path: Path,
    frames: Iterable[Frame],
    fps: float,
    codec: str = "h264",
    crf: int = 12,
    preset: str = "slow",
    bit_rate: int | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Encode frames (H W 3, consumed one at a time) to `path` (.mp4, .mkv or .mov), complete or not at all.

    codec: h264, h265 (yuv420p) or prores (.mkv, .mov; 10 bit). bit_rate: bits per second instead of crf. tags: only .mkv holds them.
    The last row or column of an odd size is cut off. Equal input gives equal bytes. Raises MediaError, OutputError.
    """
    raise NotImplementedError


def write_png(path: Path, frame: Frame, text: Mapping[str, str] | None = None) -> None:
    """Write one frame (H W 3 or H W 4) as PNG, with text chunks in UTF-8, complete or not at all. Raises OutputError."""
    raise NotImplementedError


def read_tags(path: Path) -> dict[str, str]:
    """Text stored in an mkv (keys in lower case: FFmpeg writes them in upper case) or a PNG; {} where there is none. Raises MediaError."""
    raise NotImplementedError
