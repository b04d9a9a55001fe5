"""Work on many sources ahead in threads: an error of one source becomes a Failure, others end the run."""

import contextlib
import os
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from dataset.caching.prefetch import run_ahead
from dataset.caching.reports import Failure
from dataset.config_keys import AUTO
from dataset.sources.frames import frames_wanted
from dataset.sources.media_source import MediaSource
from modules.bars import Bar
from modules.errors import MediaError, UserError
from modules.media.animations import is_animation
from modules.media.reading import video_info

T = TypeVar("T")
R = TypeVar("R")

DECODED_BYTES = 3 << 29  # 1.5 GiB of frames that wait for their consumer
FASTEST_FPS = 30.0  # of the known families; faster sources lose frames
UNKNOWN_FRAMES = 256  # assumed for a clip whose header has no count


def read_ahead(
    jobs: Sequence[T],
    source_of: Callable[[T], MediaSource],
    work: Callable[[T], R],
    workers: int,
    bar: Bar,
) -> Generator[tuple[T, R | Failure], None, None]:
    """Yield (job, result or Failure) in order while threads work on later jobs, which read little."""
    return _finish_done(jobs, source_of, work, workers, lambda _: 0, bar)


def decode_ahead(
    jobs: Sequence[T],
    source_of: Callable[[T], MediaSource],
    work: Callable[[T], R],
    workers: int,
    bar: Bar,
) -> Generator[tuple[T, R | Failure], None, None]:
    """Do as `read_ahead` for work that decodes its source: waiting frames stay under DECODED_BYTES."""
    return _finish_done(
        jobs, source_of, work, workers, lambda job: estimate_decoded_bytes(source_of(job)), bar
    )


def estimate_decoded_bytes(source: MediaSource) -> int:
    """Estimate the bytes of a source's decoded frames.

    Reads its header only if the table uses the whole clip.
    """
    if source.tensors is not None:
        return 0  # moments are small
    width, height = source.table.resolution
    frames = 1.0 if source.table.kind == "image" else frames_wanted(source.table) or _frames_in_header(source)
    channels = 3 * (1 + len(source.control)) + (source.mask_from is not None)
    return int(frames) * width * height * channels


def check_memory(source: MediaSource) -> None:
    """Raise MediaError if a clip's frames do not fit into memory, before the system kills the program."""
    needed, limit = estimate_decoded_bytes(source), machine_bytes()
    if limit and needed > 0.6 * limit:
        width, height = source.table.resolution
        raise MediaError(
            f"{source.path}: its frames take about {needed / 1e9:.0f} GB at {width}x{height}, this machine "
            f"has {limit / 1e9:.0f} GB. "
            'Cut it into shorter clips, or use frame_extraction = "head".'
        )


def machine_bytes() -> int | None:
    """Return the bytes of physical memory; None if unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _frames_in_header(source: MediaSource) -> float:
    if source.origins:  # it would have to be fetched: `check_memory` looks when it is here
        return UNKNOWN_FRAMES
    try:
        info = video_info(source.path)
        is_timed = source.table.source_fps == AUTO or is_animation(source.path)
    except UserError:
        return 0  # decoding reports the reason
    frames = info.frames or UNKNOWN_FRAMES
    if is_timed and info.fps:  # they may be repeated too
        return frames * FASTEST_FPS / info.fps
    return frames * min(1.0, FASTEST_FPS / (source.table.stated_fps or FASTEST_FPS))


def _finish_done(
    jobs: Sequence[T],
    source_of: Callable[[T], MediaSource],
    work: Callable[[T], R],
    workers: int,
    size_bytes: Callable[[T], int],
    bar: Bar,
) -> Generator[tuple[T, R | Failure], None, None]:
    with bar, contextlib.closing(run_ahead(jobs, work, workers, size_bytes, DECODED_BYTES)) as ahead:
        for job, result in ahead:
            if not isinstance(result, Exception):
                yield job, result
            elif isinstance(result, (MediaError, OSError)):
                yield job, Failure.of(source_of(job), result)
            else:
                raise result
            del result  # frees its frames before waiting for the next source
            bar.update()
