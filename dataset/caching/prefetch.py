"""Work ahead on many sources in threads, in order and within a memory limit; write in the background."""

import collections
import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from dataset.caching.reports import Failure
from dataset.config_keys import AUTO
from dataset.sources.frames import frames_wanted
from dataset.sources.media_source import MediaSource
from modules.bars import Bar
from modules.errors import MediaError, UserError
from modules.media.decoding import is_animation
from modules.media.reading import video_info

T = TypeVar("T")
R = TypeVar("R")

AHEAD_PER_WORKER = 2  # results waiting for each worker, so that one slow clip does not stop the encoder
WRITES_BEHIND = 4
MANY = 4096  # entries: of so many the values are not read to compare them, which training does
AT_ONCE = 64  # values that a thread of `map_ahead` takes


def run_ahead(
    jobs: Sequence[T], work: Callable[[T], R], workers: int, size_bytes: Callable[[T], int], limit_bytes: int
) -> Generator[tuple[T, R | Exception], None, None]:
    """Yield (job, its result or exception) in the order of `jobs`, while threads work on later jobs.

    Threads are enough: FFmpeg, OpenCV and hashing release the interpreter's lock, and frames need no copy
    between processes. size_bytes: of a result; called just before a job starts. A job starts if all results
    that are in progress, waiting or in use (until the next one is requested) stay under `limit_bytes`; a
    single one may be larger.
    """
    waiting: collections.deque[tuple[T, int, Future[R]]] = collections.deque()
    used, given, started = 0, 0, 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ahead")
    try:
        while waiting or started < len(jobs):
            used, given = used - given, 0
            while started < len(jobs) and len(waiting) < workers * (1 + AHEAD_PER_WORKER):
                size = size_bytes(jobs[started])
                if waiting and used + size > limit_bytes:
                    break
                waiting.append((jobs[started], size, pool.submit(work, jobs[started])))
                used, started = used + size, started + 1
            job, given, future = waiting.popleft()
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            yield job, future.result() if error is None else error
            del future
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def map_ahead(values: Sequence[T], work: Callable[[T], R], workers: int, bar: Bar) -> Iterator[R]:
    """Yield the results of small pieces of work in the order of `values`, while threads do the next ones.

    A thread takes many at once: handing over each would take as long as the work.
    """
    at_once = min(AT_ONCE, max(1, len(values) // (4 * workers)))
    jobs = [values[start : start + at_once] for start in range(0, len(values), at_once)]
    ahead = run_ahead(jobs, lambda some: list(map(work, some)), workers, lambda _: 0, limit_bytes=1)
    with bar, contextlib.closing(ahead):
        for job, results in ahead:
            if isinstance(results, Exception):
                raise results
            yield from results
            bar.update(len(job))


class WriteBehind:
    """A thread, or several, that writes files while the next items are encoded.

    An error is raised by a later call, or at the end.
    """

    def __init__(self, threads: int = 1) -> None:
        self._most = WRITES_BEHIND * threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="writer")
        self._waiting: collections.deque[Future[object]] = collections.deque()

    def __enter__(self) -> "WriteBehind":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self._collect(0)

    def submit(self, write: Callable[[], object]) -> None:
        """Run `write` in the background. Waits while too many writes are pending."""
        self._collect(self._most)
        self._waiting.append(self._pool.submit(write))

    def _collect(self, most: int) -> None:
        while len(self._waiting) > most or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()


DECODED_BYTES = 3 << 29  # 1.5 GiB of frames that wait for their consumer
FASTEST_FPS = 30.0  # of the known families; faster sources lose frames
UNKNOWN_FRAMES = 256  # assumed for a clip whose header has no count


def read_ahead(
    jobs: Sequence[T],
    source_of: Callable[[T], MediaSource],
    work: Callable[[T], R],
    workers: int,
    bar: Bar,
    decodes: bool = False,
) -> Generator[tuple[T, R | Failure], None, None]:
    """Yield (job, result or Failure) in order while threads work on later jobs.

    decodes: `work` decodes its source, and waiting frames stay under DECODED_BYTES; else it reads little.
    """

    def size_bytes(job: T) -> int:
        return estimate_decoded_bytes(source_of(job)) if decodes else 0

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


def decode_ahead(
    jobs: Sequence[T],
    source_of: Callable[[T], MediaSource],
    work: Callable[[T], R],
    workers: int,
    bar: Bar,
) -> Generator[tuple[T, R | Failure], None, None]:
    """Do as `read_ahead` for work that decodes its source."""
    return read_ahead(jobs, source_of, work, workers, bar, decodes=True)


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
    needed, limit = estimate_decoded_bytes(source), 0
    with contextlib.suppress(AttributeError, ValueError, OSError):  # else unknown
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if limit and needed > 0.6 * limit:
        width, height = source.table.resolution
        raise MediaError(
            f"{source.path}: its frames take about {needed / 1e9:.0f} GB at {width}x{height}, this machine "
            f"has {limit / 1e9:.0f} GB. "
            'Cut it into shorter clips, or use frame_extraction = "head".'
        )


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
