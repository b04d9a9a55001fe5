"""Work ahead on many sources in threads, in order and within a memory limit; report the results of a run."""

import collections
import contextlib
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil  # comes with accelerate

from dataset.config import DatasetConfig, DatasetTable
from dataset.config_keys import AUTO
from dataset.listing import find_all_sources
from dataset.options import CachingOptions
from dataset.sources.audio import count_frames
from dataset.sources.frames import max_decoded_frames
from dataset.sources.media_source import Fault, MediaSource
from modules.bars import Bar
from modules.console import Row, pluralize, show_box
from modules.errors import DatasetError, MediaError, UserError
from modules.installation import RUN_GOES_ON, SOURCES_LEFT_OUT
from modules.media.decoding import is_animation
from modules.media.reading import video_info

logger = logging.getLogger(__name__)

LISTED = 200  # maximum number of lines about sources in a message
NAMED = 3  # maximum number of clips that a warning names


@dataclass(frozen=True)
class Failure:
    """A media file with a problem, and a description of the problem."""

    path: Path
    reason: str
    table: int  # index of the source's table
    stem: str  # stem of the source

    @staticmethod
    def of(source: MediaSource, reason: object) -> "Failure":
        """Create the report about a source that could not be used; `reason` is a text or an exception."""
        return Failure(source.path, str(reason), source.table.index, source.stem)

    def __str__(self) -> str:
        return self.reason if str(self.path) in self.reason else f"{self.path}: {self.reason}"


SIZE_CHANGES = (
    "have frames of several sizes: those of a different shape than the first are cropped to its shape"
)


@dataclass(frozen=True)
class CacheReport:
    """Results of a caching run; counts are numbers of cache files."""

    written: int = 0
    reused: int = 0  # valid files that existed before
    num_without_record: int = 0  # valid files of another program, which have no record
    removed: int = 0
    failures: tuple[Failure, ...] = ()  # sources that could not be read
    dropped: tuple[Failure, ...] = ()  # sources that can be read but give no item
    shortened: tuple[Failure, ...] = ()  # clips too short for some of target_frames
    resized: tuple[Failure, ...] = ()  # clips whose frames change their size
    silent: tuple[Failure, ...] = ()  # clips without audio, for a model with audio
    num_assigned: int = 0  # number of sources or captions in this run's share
    num_total: int = 0  # number of all sources or captions
    is_main: bool = True  # whether this process shows the results
    # table index and name of each valid entry
    valid: frozenset[tuple[int, str]] = field(default=frozenset(), compare=False, repr=False)


class SourceListing(NamedTuple):
    """Media files of a dataset, a report of unreadable ones, and the tables that were listed completely."""

    sources: list[MediaSource]
    report: CacheReport  # failures: unreadable parts, such as the end of a tar
    complete_tables: list[DatasetTable]  # tables without failures: only these can have stale entries


def list_sources(config: DatasetConfig, captions: bool) -> SourceListing:
    """List the media files of all tables; `captions` says whether to read captions, too."""
    skipped: list[tuple[DatasetTable, Fault]] = []
    sources = find_all_sources(config, captions, skipped=skipped)
    failures = [
        Failure(table.source.path, error.text, table.index, error.stem or "") for table, error in skipped
    ]
    broken = {table.index for table, _ in skipped}
    complete = [table for table in config.datasets if table.index not in broken]
    return SourceListing(sources, CacheReport(failures=tuple(failures)), complete)


def join_reports(reports: Sequence[CacheReport]) -> CacheReport:
    """Merge reports about parts of the dataset; failures are sorted by path."""
    fields: dict[str, Any] = {"num_total": max((report.num_total for report in reports), default=0)}
    for name in ("written", "reused", "num_without_record", "num_assigned"):
        fields[name] = sum(getattr(report, name) for report in reports)
    for name in ("failures", "dropped", "shortened", "resized", "silent"):
        failures = [failure for report in reports for failure in getattr(report, name)]
        fields[name] = tuple(sorted(failures, key=lambda failure: str(failure.path)))
    return CacheReport(**fields, valid=frozenset().union(*(report.valid for report in reports)))


def conclude(report: CacheReport, rows: Sequence[Row] = (), commands: Sequence[Row] = ()) -> None:
    """Show the results of a caching run, and raise an error if media files failed.

    Args:
        report: Results of the run.
        rows: Additional rows of the box with the results.
        commands: Next commands, which are shown below the box.

    Raises:
        DatasetError: If a media file failed or none gives an item, in the main process.
        SystemExit: If a media file failed, in other processes, with the same exit code.
    """
    exit_code = DatasetError.exit_code
    # this is a step of a longer run, which continues without the failed files and shows its own next command
    if os.environ.get(RUN_GOES_ON):
        exit_code = SOURCES_LEFT_OUT
        commands = ()
    if not report.is_main:
        if report.failures:
            raise SystemExit(exit_code)
        return
    _log_remarks(report)
    has_files = report.written or report.reused
    is_partial = report.num_assigned < report.num_total  # a part without files is a normal result
    if has_files or report.removed or is_partial:
        files = f"{report.written} written, {report.reused} kept, {report.removed} removed"
        shown_commands = () if report.failures else commands  # failures have to be repaired first
        show_box("Caching is finished", [("cache files", files), *rows], shown_commands)
    if report.failures:
        failed = failure_error(report.failures, "sources")
        failed.exit_code = exit_code
        raise failed
    if report.dropped and not has_files and not is_partial:
        raise DatasetError(
            f"none of the {report.num_total} sources gives an item to train on: the lines above say why. "
            "Lower target_frames, or use longer clips"
        )


def _log_remarks(report: CacheReport) -> None:
    """Log the media files without items, and those that were changed or could only be compared in part."""
    if report.dropped:
        lines = "\n".join(first_lines(report.dropped, LISTED))
        count = pluralize(len(report.dropped), "sources give no item to train on")
        logger.warning("%s:\n%s", count, lines)
    remarks = (
        (report.shortened, "clips give no item of some lengths", logging.WARNING),
        (report.resized, f"clips {SIZE_CHANGES}", logging.WARNING),
        (report.silent, "clips have no sound: only their pictures are learned", logging.INFO),
    )
    for clips, text, level in remarks:
        if clips:
            first = "; ".join(map(str, clips[:NAMED]))
            logger.log(level, "%s. The first: %s", pluralize(len(clips), text), first)
    if report.num_without_record:
        logger.warning(
            "%s by another program: only the size could be compared (--skip_existing)",
            pluralize(report.num_without_record, "files were made"),
        )


def first_lines(things: Sequence[object], maximum: int) -> list[str]:
    """Return the first `maximum` items as indented lines, and a line with the number of the others."""
    lines = [f"  {line}" for line in things[:maximum]]
    if len(things) > maximum:
        lines.append(f"  ... and {len(things) - maximum} more")
    return lines


def failure_error(failures: Sequence[Failure], things: str) -> DatasetError:
    """Return the error for all failures of a caching run, to be raised when it ends.

    `things` is a plural noun, such as "sources".
    """
    lines = "\n".join(first_lines(failures, LISTED))
    return DatasetError(
        f"{len(failures)} of the {things} could not be used; all others are done:\n{lines}\n"
        "  Repair or remove these files, then run the same command again."
    )


T = TypeVar("T")
R = TypeVar("R")

AHEAD_PER_WORKER = 2  # waiting results per worker, so that one slow clip does not stall the encoder
WRITES_BEHIND = 4  # pending writes per thread
# for this many sources or more, caching does not read tensor values of caches, only training does
MANY = 4096
AT_ONCE = 64  # maximum number of values that a `map_ahead` thread takes at a time


def count_workers(options: CachingOptions) -> int:
    """Return the number of decoding threads: --num_workers, or one less than the number of CPUs."""
    return options.num_workers or max(1, (os.cpu_count() or 2) - 1)


def run_ahead(
    jobs: Sequence[T], work: Callable[[T], R], workers: int, size_bytes: Callable[[T], int], limit_bytes: int
) -> Generator[tuple[T, R | Exception], None, None]:
    """Yield (job, its result or exception) in the order of `jobs`, while threads work on later jobs.

    Threads suffice, because FFmpeg, OpenCV and hashing release the GIL, and frames need not be copied between
    processes.

    Args:
        jobs: Jobs in order.
        work: Does one job.
        workers: Number of threads.
        size_bytes: Estimates the size of a job's result; it is called just before the job starts.
        limit_bytes: Maximum total size of all results that are in progress, waiting or in use; a result is
            in use until the next one is requested. A single result may be larger.
    """
    waiting: collections.deque[tuple[T, int, Future[R]]] = collections.deque()
    used_bytes = 0  # bytes of all results in progress, waiting or in use
    yielded_bytes = 0  # bytes of the result that was yielded last
    started = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ahead")
    try:
        while waiting or started < len(jobs):
            used_bytes -= yielded_bytes
            yielded_bytes = 0
            while started < len(jobs) and len(waiting) < workers * (1 + AHEAD_PER_WORKER):
                size = size_bytes(jobs[started])
                if waiting and used_bytes + size > limit_bytes:
                    break
                waiting.append((jobs[started], size, pool.submit(work, jobs[started])))
                used_bytes += size
                started += 1
            job, yielded_bytes, future = waiting.popleft()
            error = future.exception()
            if error is not None and not isinstance(error, Exception):  # such as KeyboardInterrupt
                raise error
            yield job, future.result() if error is None else error
            del future  # it references the result, which the caller may want to free
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def map_ahead(values: Sequence[T], work: Callable[[T], R], workers: int, bar: Bar) -> Iterator[R]:
    """Yield `work(value)` for each value in order, while threads compute the next results.

    A thread takes a group of values at a time, because passing single values would take as long as the work.
    """
    # each thread gets several groups, so that all threads finish at about the same time
    group_size = min(AT_ONCE, max(1, len(values) // (4 * workers)))
    groups = [values[start : start + group_size] for start in range(0, len(values), group_size)]
    ahead = run_ahead(
        groups,
        work=lambda group: list(map(work, group)),
        workers=workers,
        size_bytes=lambda _: 0,  # results are small, so memory need not be limited
        limit_bytes=1,
    )
    with bar, contextlib.closing(ahead):
        for group, results in ahead:
            if isinstance(results, Exception):
                raise results
            yield from results
            bar.update(len(group))


Write = Callable[[Callable[[], object]], None]  # runs a function in the background


@contextlib.contextmanager
def write_behind(threads: int = 1) -> Iterator[Write]:
    """Yield a function that runs the writing of cache files in threads, while the next items are encoded.

    The function waits while too many writes are pending. Errors of a write are raised by a later call, or at
    the end of the block.
    """
    waiting: collections.deque[Future[object]] = collections.deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="writer") as pool:

        def write(work: Callable[[], object]) -> None:
            """Run a write in another thread; wait first if too many writes are pending."""
            # the oldest writes are taken if there are too many, or if they are done, to raise their errors
            while len(waiting) > WRITES_BEHIND * threads or (waiting and waiting[0].done()):
                waiting.popleft().result()  # waits, and raises the error of that write
            waiting.append(pool.submit(work))

        yield write
    for future in waiting:
        future.result()


def fill_batches(
    items: Iterable[T],
    get_group: Callable[[T], object],
    get_batch_size: Callable[[T], int],
    get_num_bytes: Callable[[T], int],
    max_bytes: int,
) -> Iterator[list[T]]:
    """Group items, and yield each group's items as a batch as soon as there are enough.

    Args:
        items: Items of any group.
        get_group: Returns the group of an item.
        get_batch_size: Returns the batch size for an item.
        get_num_bytes: Returns the size of an item in bytes.
        max_bytes: Limit for all waiting items together; beyond it, the largest group is yielded early.

    Yields:
        Batches of items of one group; incomplete batches come last.
    """
    waiting: dict[object, list[T]] = {}
    for item in items:
        group = get_group(item)
        batch_size = get_batch_size(item)
        waiting.setdefault(group, []).append(item)
        del item  # frees its frames before waiting for the next source
        if len(waiting[group]) >= batch_size:
            yield waiting.pop(group)
        sizes = {group: sum(map(get_num_bytes, members)) for group, members in waiting.items()}
        if sum(sizes.values()) > max_bytes:
            yield waiting.pop(max(sizes, key=sizes.__getitem__))
    while waiting:
        yield waiting.pop(next(iter(waiting)))


DECODED_BYTES = 3 << 29  # 1.5 GiB of frames that wait for their consumer
FASTEST_FPS = 30.0  # highest frame rate of the families; frames of faster sources are dropped
UNKNOWN_FRAMES = 256  # assumed for a clip whose header has no count


def read_ahead(
    jobs: Sequence[T],
    get_source: Callable[[T], MediaSource],
    work: Callable[[T], R],
    workers: int,
    bar: Bar,
    decodes: bool = False,
) -> Generator[tuple[T, R | Failure], None, None]:
    """Yield (job, result or Failure) in order while threads work on later jobs.

    A MediaError or OSError becomes a Failure; other errors are raised.

    Args:
        jobs: Jobs in order.
        get_source: Returns the media file of a job.
        work: Does one job.
        workers: Number of threads.
        bar: Progress bar, which counts jobs.
        decodes: Whether `work` decodes the file; waiting frames are then limited to DECODED_BYTES.
    """
    ahead = run_ahead(
        jobs,
        work=work,
        workers=workers,
        size_bytes=lambda job: estimate_decoded_bytes(get_source(job)) if decodes else 0,
        limit_bytes=DECODED_BYTES,
    )
    with bar, contextlib.closing(ahead):
        for job, result in ahead:
            if not isinstance(result, Exception):
                yield job, result
            elif isinstance(result, (MediaError, OSError)):
                yield job, Failure.of(get_source(job), result)
            else:
                raise result
            del result  # frees its frames before waiting for the next source
            bar.update()


def estimate_decoded_bytes(source: MediaSource) -> int:
    """Estimate the bytes of all decoded frames of an image or clip, including control media and masks.

    The header is read only if the table uses the whole clip.
    """
    table = source.table
    if source.precomputed is not None:
        return 0  # moments are small
    num_frames: float | None = 1 if table.kind == "image" else max_decoded_frames(table)
    if not num_frames:  # the table uses the whole clip
        num_frames = _estimate_frames(source)
    width, height = table.buckets.resolution
    num_rejected = 0 if source.rejected is None else 1
    num_clips = 1 + len(source.control) + len(source.references) + num_rejected + len(source.layers)
    num_masks = (source.mask_from is not None) + (source.control_mask is not None)
    channels = 3 * num_clips + num_masks  # RGB clips, masks of one channel
    return int(num_frames) * width * height * channels


def _estimate_frames(source: MediaSource) -> float:
    """Estimate from the header how many frames of a full clip are kept, to plan memory."""
    table = source.table
    if source.remote_or_packed:  # not downloaded yet; `check_memory` checks again once the file is local
        return UNKNOWN_FRAMES
    if table.source.is_audio_only:  # audio samples take about as much memory as frames at this rate
        with contextlib.suppress(UserError):
            return count_frames(source.path, FASTEST_FPS)
        return 0
    try:
        info = video_info(source.path)
        num_frames = info.frames or UNKNOWN_FRAMES
        is_timed = table.buckets.source_fps == AUTO or is_animation(source.path)
        if is_timed and info.fps:  # frames are chosen by time, so clips with a low rate repeat some
            return num_frames * FASTEST_FPS / info.fps
        # at a declared rate above the fastest one, some frames are dropped
        return num_frames * min(1.0, FASTEST_FPS / (table.buckets.declared_fps or FASTEST_FPS))
    except UserError:
        return 0  # decoding reports the reason


def check_memory(source: MediaSource) -> None:
    """Raise MediaError if a clip's frames do not fit into memory: the system would kill the program."""
    needed = estimate_decoded_bytes(source)
    limit = psutil.virtual_memory().total
    if needed > 0.6 * limit:
        width, height = source.table.buckets.resolution
        raise MediaError(
            f"{source.path}: its frames take about {needed / 1e9:.0f} GB at {width}x{height}, this machine "
            f"has {limit / 1e9:.0f} GB. "
            'Cut it into shorter clips, or use frame_extraction = "head".'
        )
