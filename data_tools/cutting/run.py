"""Cut all videos that a command names, several at once if wanted, and list their clips."""

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from threading import Event

from data_tools.cutting.clip_list import ClipList
from data_tools.cutting.footage import CuttingJob, Result, Workshop, check_old_clips, cut_video
from data_tools.cutting.inputs import FootageSource, find_videos, free_stem
from data_tools.cutting.options import CuttingOptions
from data_tools.cutting.planning import PlannedClip, count_reasons
from data_tools.cutting.records import CutRecord, list_line, read_records, write_record
from data_tools.cutting.scenes import load_detector
from modules.atomic_write import make_folder
from modules.console import count_of, in_words, show_box
from modules.control_codes import escape_control_codes
from modules.errors import DatasetError, OptionError, UserError
from modules.media.scenes import clock_time
from modules.text_files import bad_character

logger = logging.getLogger(__name__)

LIST_SECONDS = 10.0  # at least between two times that the list is written during a run
WAIT_SECONDS = 0.5  # Windows tells a waiting thread of Ctrl-C only then


def cut_footage(options: CuttingOptions) -> None:
    """Run the work of a command line.

    Raises UserError if nothing can be done, and DatasetError at the end if some sources could not be cut.
    """
    started = time.monotonic()
    make = load_detector(options.scenes)
    sources = find_videos(options.input, options.output)
    output = options.output.resolve()
    if bad_character(str(output)):
        raise OptionError(f"--output {ascii(str(output))}: the list of clips cannot hold this name")
    records = {} if options.dry_run else read_records(output)
    jobs = _name_jobs(sources, records)
    shop = Workshop(options, output, make, Event(), options.num_workers == 1 or len(jobs) == 1)
    if options.dry_run:
        _finish(_preview(jobs, shop), len(jobs))
        return
    make_folder(output, "--output")
    make_folder(options.list_path.resolve().parent, "--jsonl")
    ledger = _Ledger(shop)
    jobs, failures = ledger.check(jobs)
    results: dict[int, Result] = {}
    try:
        for place, result in _each(jobs, shop):
            if isinstance(result, Exception):
                failures[jobs[place].source.path] = result
                continue
            results[place] = result
            ledger.note(place, result)
            _tell(jobs[place].source.path, result)
    finally:
        ledger.close()
    _conclude(list(results.values()), shop, time.monotonic() - started)
    _finish(failures, len(sources))


def _name_jobs(sources: Sequence[FootageSource], records: dict[str, CutRecord]) -> list[CuttingJob]:
    """Return the jobs: a source keeps the earlier name of its clips."""
    taken = {record.stem.casefold() for record in records.values()}
    jobs = []
    for source in sources:
        record = records.get(str(source.path))
        stem = free_stem(source.stem, taken) if record is None else record.stem
        taken.add(stem.casefold())
        jobs.append(CuttingJob(source, stem, record))
    return jobs


class _Ledger:
    """The list of clips during a run, and which records say that it has their lines."""

    def __init__(self, shop: Workshop) -> None:
        self._output, self._path = shop.output, shop.options.list_path.resolve()
        self._shop = shop
        self._list = ClipList(self._path)
        self._unlisted: list[CutRecord] = []  # their lines are added, but not written yet
        self._written = time.monotonic()

    def check(self, jobs: Sequence[CuttingJob]) -> tuple[list[CuttingJob], dict[Path, Exception]]:
        """Return the jobs that can be done; lines of clips that will be cut anew are taken out before."""
        kept, failures, stale = [], {}, False
        for job in jobs:
            try:
                old = check_old_clips(job, self._shop, self._list)
            except (UserError, OSError) as error:
                failures[job.source.path] = _reported(job, error, len(jobs))
                continue
            if old and job.record is not None:
                write_record(self._output, replace(job.record, lists=()))
                self._list.remove(old)
                stale = True
            kept.append(job)
        if stale:
            self._list.write()
        return kept, failures

    def note(self, place: int, result: Result) -> None:
        """Add the lines of a source that is done."""
        record = result.record
        assert record is not None
        if str(self._path) in record.lists and self._list.was_there:
            return
        there = [one for one in record.clips if result.is_new or (self._output / one.name).exists()]
        self._list.add(place, [list_line(self._output, record, one) for one in there])
        self._unlisted.append(record)
        if time.monotonic() - self._written >= LIST_SECONDS:
            self.close()

    def close(self) -> None:
        """Write additions since the last time."""
        if not self._unlisted:
            return
        self._list.write()
        for record in self._unlisted:
            lists = tuple(dict.fromkeys([*record.lists, str(self._path)]))
            write_record(self._output, replace(record, lists=lists))
        self._unlisted = []
        self._written = time.monotonic()


def _each(jobs: Sequence[CuttingJob], shop: Workshop) -> Iterator[tuple[int, Result | Exception]]:
    """Yield the result of each job, or its error, as they end."""
    pool = ThreadPoolExecutor(shop.options.num_workers, thread_name_prefix="cut")
    try:
        waiting: dict[Future[Result], int] = {
            pool.submit(cut_video, job, shop): place for place, job in enumerate(jobs)
        }
        while waiting:
            done, _ = wait(waiting, WAIT_SECONDS, FIRST_COMPLETED)
            for future in sorted(done, key=waiting.__getitem__):
                place = waiting.pop(future)
                try:
                    result: Result | Exception = future.result()
                except (UserError, OSError) as error:
                    result = _reported(jobs[place], error, len(jobs))
                yield place, result
    finally:
        shop.stop.set()  # if this ends early, so do the threads: at the next frame
        pool.shutdown(wait=True, cancel_futures=True)


def _reported(job: CuttingJob, error: Exception, total: int) -> Exception:
    """Return the error; of several videos, say at once which one fails."""
    if total > 1:
        logger.error("%s is skipped: %s", job.source.path, error)
    return error


def _preview(jobs: Sequence[CuttingJob], shop: Workshop) -> dict[Path, Exception]:
    """Print the clips that would be cut. Returns the failures."""
    failures = {}
    for place, result in _each(jobs, shop):
        path = jobs[place].source.path
        if isinstance(result, Exception):
            failures[path] = result
        else:
            lines = [f"{path}: {_in_words(result.clips)}", *map(_line, result.clips)]
            sys.stdout.write(escape_control_codes("\n".join(lines)) + "\n")
    return failures


def _line(clip: PlannedClip) -> str:
    times = f"{_clock(clip.start)} to {_clock(clip.start + clip.seconds)}"
    kept = f"left out: {clip.dropped}" if clip.dropped else "clip"
    return (
        f"  scene {clip.scene}, {times}, {clip.seconds:.3f} s, frames {clip.first} to {clip.end - 1} "
        f"({clip.frames}): {kept}"
    )


def _clock(seconds: float) -> str:
    return clock_time(Fraction(seconds))


def _in_words(clips: Sequence[PlannedClip]) -> str:
    scenes = count_of(len({clip.scene for clip in clips}), "scene")
    kept = count_of(sum(not clip.dropped for clip in clips), "clip")
    return f"{scenes}, {kept}{_reasons(count_reasons(clips))}"


def _reasons(counts: Counter[str]) -> str:
    if not counts:
        return ""
    parts = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    return f"; left out: {parts}"


def _tell(path: Path, result: Result) -> None:
    if result.is_new:
        logger.info("%s: %s", path, _in_words(result.clips))


def _conclude(results: Sequence[Result], shop: Workshop, seconds: float) -> None:
    if not results:
        return
    new = [result for result in results if result.is_new]
    reasons = sum((count_reasons(result.clips) for result in new), Counter[str]())
    clips = sum(len(result.record.clips) for result in results if result.record is not None)
    rows = [
        ("videos", f"{len(new)} cut, {len(results) - len(new)} done before"),
        ("clips", f"{clips}, {sum(result.written for result in new)} of them written now"),
        ("left out", ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())),
        ("time", in_words(seconds)),
        (
            "list",
            f'video_jsonl_file = "{shop.options.list_path.resolve().as_posix()}"',
        ),
    ]
    show_box("Cutting is finished", rows)


def _finish(failures: dict[Path, Exception], total: int) -> None:
    """Raise DatasetError if some of several videos could not be cut; for a single one, its own error."""
    if not failures:
        return
    if total == 1:
        (error,) = failures.values()
        raise error if isinstance(error, UserError) else DatasetError(str(error)) from error
    said = ((path, str(error)) for path, error in sorted(failures.items()))
    lines = "\n".join(f"  {text}" if str(path) in text else f"  {path}: {text}" for path, text in said)
    raise DatasetError(
        f"{len(failures)} of {count_of(total, 'video')} could not be cut; all others are done:\n{lines}\n"
        "  Repair or remove these files, then run the same command again."
    )
