"""Work on many sources in threads ahead of need: what concerns one source only becomes a Failure, all else ends the run."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from dataset.frames import frames_wanted
from dataset.prefetch import run_ahead
from dataset.reports import Failure
from dataset.sources import Source
from modules.errors import MediaError, UserError
from modules.media import video_info

T = TypeVar("T")
R = TypeVar("R")

DECODED_BYTES = 3 << 29  # 1.5 GiB of frames that wait for their consumer
UNKNOWN_FRAMES = 256  # a clip whose header has no count is taken to have as many


def read_ahead(
    jobs: Sequence[T], source_of: Callable[[T], Source], work: Callable[[T], R], workers: int, bar: "tqdm[None]"
) -> Iterator[tuple[T, R | Failure]]:
    """Yield (job, result or Failure) in order while later jobs are worked on; for work that only reads a little."""
    return _settled(jobs, source_of, work, workers, lambda _: 0, bar)


def decode_ahead(
    jobs: Sequence[T], source_of: Callable[[T], Source], work: Callable[[T], R], workers: int, bar: "tqdm[None]"
) -> Iterator[tuple[T, R | Failure]]:
    """Likewise for work that decodes its source: the frames that wait stay under DECODED_BYTES."""
    return _settled(jobs, source_of, work, workers, lambda job: decoded_bytes(source_of(job)), bar)


def progress(total: int, what: str, unit: str = "source", shown: bool = True) -> "tqdm[None]":
    """A progress bar that appears when the work takes longer than a second."""
    return tqdm(total=total, desc=what, unit=unit, delay=1, disable=not shown)


def decoded_bytes(source: Source) -> int:
    """About what the decoded frames of a source take. Its header is read only where the table wants all of a clip."""
    width, height = source.table.resolution
    frames = 1 if source.table.kind == "image" else frames_wanted(source.table) or _frames_in_header(source.path)
    return frames * width * height * 3 * (1 + len(source.control))


def _frames_in_header(path: Path) -> int:
    try:
        return video_info(path).frames or UNKNOWN_FRAMES
    except UserError:
        return 0  # decoding will say why


def _settled(
    jobs: Sequence[T],
    source_of: Callable[[T], Source],
    work: Callable[[T], R],
    workers: int,
    size_bytes: Callable[[T], int],
    bar: "tqdm[None]",
) -> Iterator[tuple[T, R | Failure]]:
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
