"""Work on many sources in threads ahead of need: what concerns one source only becomes a Failure, all else
ends the run.
"""

import contextlib
import os
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from tqdm import tqdm

from dataset.caching.prefetch import run_ahead
from dataset.caching.reports import Failure
from dataset.sources.frames import frames_wanted
from dataset.sources.listing import Source
from modules.errors import MediaError, UserError
from modules.media.reading import video_info

T = TypeVar("T")
R = TypeVar("R")

DECODED_BYTES = 3 << 29  # 1.5 GiB of frames that wait for their consumer
FASTEST_FPS = 30.0  # of the known families; faster sources lose frames
UNKNOWN_FRAMES = 256  # a clip whose header has no count is taken to have as many


def read_ahead(
    jobs: Sequence[T],
    source_of: Callable[[T], Source],
    work: Callable[[T], R],
    workers: int,
    bar: "tqdm[None]",
) -> Generator[tuple[T, R | Failure], None, None]:
    """Yield (job, result or Failure) in order while later jobs are worked on; for work that only reads a
    little.
    """
    return _settled(jobs, source_of, work, workers, lambda _: 0, bar)


def decode_ahead(
    jobs: Sequence[T],
    source_of: Callable[[T], Source],
    work: Callable[[T], R],
    workers: int,
    bar: "tqdm[None]",
) -> Generator[tuple[T, R | Failure], None, None]:
    """Likewise for work that decodes its source: the frames that wait stay under DECODED_BYTES."""
    return _settled(jobs, source_of, work, workers, lambda job: decoded_bytes(source_of(job)), bar)


def progress(total: int, what: str, unit: str = "source", shown: bool = True) -> "tqdm[None]":
    """A progress bar that appears when the work takes longer than a second."""
    return tqdm(total=total, desc=what, unit=unit, delay=1, disable=not shown)


def decoded_bytes(source: Source) -> int:
    """About what the decoded frames of a source take.

    Its header is read only where the table wants all of a clip.
    """
    width, height = source.table.resolution
    frames = 1.0 if source.table.kind == "image" else frames_wanted(source.table) or _frames_in_header(source)
    return int(frames) * width * height * 3 * (1 + len(source.control))


def check_memory(source: Source) -> None:
    """Raise MediaError where a clip's frames cannot fit this machine: better than the system ending the
    program.
    """
    needed, limit = decoded_bytes(source), machine_bytes()
    if limit and needed > 0.6 * limit:
        width, height = source.table.resolution
        raise MediaError(
            f"{source.path}: its frames take about {needed / 1e9:.0f} GB at {width}x{height}, this machine "
            "has"
            f" {limit / 1e9:.0f} GB. "
            'Cut it into shorter clips, or use frame_extraction = "head".'
        )


def machine_bytes() -> int | None:
    """Physical memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _frames_in_header(source: Source) -> float:
    try:
        frames = video_info(source.path).frames or UNKNOWN_FRAMES
    except UserError:
        return 0  # decoding will say why
    return frames * min(1.0, FASTEST_FPS / (source.table.source_fps or FASTEST_FPS))


def _settled(
    jobs: Sequence[T],
    source_of: Callable[[T], Source],
    work: Callable[[T], R],
    workers: int,
    size_bytes: Callable[[T], int],
    bar: "tqdm[None]",
) -> Generator[tuple[T, R | Failure], None, None]:
    with bar, contextlib.closing(run_ahead(jobs, work, workers, size_bytes, DECODED_BYTES)) as ahead:
        for job, result in ahead:
            if not isinstance(result, Exception):
                yield job, result
            elif isinstance(result, (MediaError, OSError)):
                yield job, Failure.of(source_of(job), result)
            else:
                raise result
            del result  # gives its frames back before the next source is waited for
            bar.update()
