"""Run work ahead in threads, in order and within a memory limit; write files in the background."""

import collections
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

AHEAD_PER_WORKER = 2  # results waiting for each worker, so that one slow clip does not stop the encoder
WRITES_BEHIND = 4


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
