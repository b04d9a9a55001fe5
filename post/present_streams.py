"""Read and write videos with what there is."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

from modules.media.reading import timed_frames, video_info
from modules.media.tags import read_tags
from modules.media.writing import write_video
from post.pixels import to_bytes


@dataclass(frozen=True)
class SourceInfo:
    width: int
    height: int
    rate: Fraction
    frames: int | None
    is_deep: bool


@dataclass(frozen=True)
class ShownFrame:
    pixels: Any
    start: Fraction
    seconds: Fraction


def source_info(path: Path) -> SourceInfo:
    info = video_info(path)
    return SourceInfo(
        info.width, info.height, Fraction(info.fps or 25).limit_denominator(1001), info.frames, False
    )


def shown_frames(path: Path, deep: bool, limit: int | None = None) -> Iterator[ShownFrame]:
    for frame in islice(timed_frames(path), limit):
        start, end = (Fraction(time).limit_denominator(90000) for time in (frame.start, frame.end))
        yield ShownFrame(frame.pixels, start, end - start)


def write_shown(
    path: Path,
    frames: Iterable[Any],
    rate: Fraction,
    codec: str,
    *,
    crf: int = 12,
    preset: str = "slow",
    companions_of: Path | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    kept = {} if companions_of is None else read_tags(companions_of)
    write_video(
        path,
        (to_bytes(frame.pixels) for frame in frames),
        float(rate),
        codec,
        crf,
        preset,
        tags={**kept, **(tags or {})},
    )
