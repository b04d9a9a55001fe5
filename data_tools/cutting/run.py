"""Cut all videos that a command names, several at once if requested, and list their clips."""

import contextlib
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from threading import Event

from data_tools.cutting.clips import PlannedClip, look_at, plan_clips
from data_tools.cutting.options import CuttingOptions
from data_tools.cutting.records import MARK, ClipList, CutRecord, read_records, start_record, write_record
from data_tools.cutting.scenes import load_detector
from dataset.caching.prefetch import Failure, failure_error
from dataset.sources.media_source import readable_stem
from modules.atomic_write import make_folder
from modules.bars import FRAMES, Bar
from modules.console import count_of, in_words, show_box
from modules.control_codes import escape_control_codes
from modules.errors import DatasetError, MediaError, OptionError, OutputError, UserError
from modules.media.encoding import Picture, settle_codec
from modules.media.measures import clock_time
from modules.media.reading import VIDEO_SUFFIXES
from modules.media.streams import shown_frames, source_info
from modules.media.writing import VideoSection, write_shown
from modules.text_files import bad_character, real_path

logger = logging.getLogger(__name__)

# including those of phones, cameras and broadcasts
SUFFIXES = VIDEO_SUFFIXES | {".3gp", ".mts", ".m2ts", ".ts", ".vob", ".ogv"}
WAIT_SECONDS = 0.5  # seconds: on Windows, Ctrl-C is noticed only between waits
NAMED = 3  # files that a message names
MICRO = 1_000_000
# a source (absolute), the name of its clips, and the record of an earlier run
CuttingJob = tuple[Path, str, CutRecord | None]


class CuttingStopped(Exception):
    """Signal to a thread that it has to stop."""


@dataclass(frozen=True)
class CutResult:
    """Result for a source."""

    record: CutRecord | None  # None: a dry run
    clips: Sequence[PlannedClip]  # including those that are left out
    is_new: bool = True  # whether anything was to be done
    written: int = 0  # clips of this run


def cut_footage(options: CuttingOptions) -> None:
    """Run the work of a command line.

    Raises UserError if nothing can be done, and DatasetError at the end if some sources could not be cut.
    """
    started = time.monotonic()
    load_detector(options.scenes)  # first: it says what is missing before anything is read
    sources = find_videos(options.input, options.output)
    output, list_path = real_path(options.output), real_path(options.list_path)
    if bad_character(str(output)):
        raise OptionError(f"--output {ascii(str(output))}: the list of clips cannot hold this name")
    records = {} if options.dry_run else read_records(output)
    # without capitals, because file systems of Windows and macOS ignore them
    taken = {record.stem.casefold() for record in records.values()}
    jobs: list[CuttingJob] = []
    for path, wanted in sources.items():
        earlier, stem, number = records.get(str(path)), wanted, 1
        while earlier is None and stem.casefold() in taken:
            number += 1
            stem = f"{wanted}-{number}"
        stem = stem if earlier is None else earlier.stem
        taken.add(stem.casefold())
        jobs.append((path, stem, earlier))
    if not options.dry_run:
        make_folder(output, "--output")
        make_folder(list_path.parent, "--jsonl")
    clip_list = ClipList(list_path, output)
    shop = Workshop(options, output, options.num_workers == 1 or len(jobs) == 1, clip_list)
    failures: list[tuple[Path, Exception]] = []
    results = []
    try:
        for source, result in _each(jobs, shop, failures):
            results.append(result)
            if result.record is None:
                lines = [f"{source}: {_in_words(result.clips)}", *map(_scene_line, result.clips)]
                sys.stdout.write(escape_control_codes("\n".join(lines)) + "\n")
                continue
            if result.is_new:
                logger.info("%s: %s", source, _in_words(result.clips))
            clip_list.add(result.record, result.is_new)
    finally:
        clip_list.write()
    if results and not options.dry_run:
        new = [result for result in results if result.is_new]
        clips = sum(len(result.record.clips) for result in results if result.record is not None)
        rows = [
            ("videos", f"{len(new)} cut, {len(results) - len(new)} done before"),
            ("clips", f"{clips}, {sum(result.written for result in new)} of them written now"),
            ("left out", _reasons([clip for result in new for clip in result.clips])),
            ("time", in_words(time.monotonic() - started)),
            ("list", f'video_jsonl_file = "{list_path.as_posix()}"'),
        ]
        show_box("Cutting is finished", rows)
    if len(failures) == len(sources) == 1:
        ((_, error),) = failures
        raise error if isinstance(error, UserError) else DatasetError(str(error)) from error
    if failures:
        told = [Failure(path, str(error), 0, path.stem) for path, error in failures]
        raise failure_error(told, count_of(len(sources), "video"))


def find_videos(given: Path, output: Path) -> dict[Path, str]:
    """Return the given video, or all videos below the given folder sorted by path, each with a stem.

    The stem, made of the path below `given`, names the clips, unless another source has it. Files in `output`
    and in other folders that clips were cut into are left out. Raises MediaError if there is no video.
    """
    if not given.is_dir():
        return {real_path(given): readable_stem(given.stem)}
    root, own = real_path(given), real_path(output)
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and here / name != own)
        if here == root or not (here / MARK).is_dir():
            paths = [here / name for name in sorted(names) if not name.startswith(".")]
            found += [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not found:
        raise MediaError(
            f"--input {given} is a folder without videos (clips of this command do not count). Their names "
            f"end in {', '.join(sorted(SUFFIXES))}."
        )
    return {path: readable_stem("_".join(path.relative_to(root).with_suffix("").parts)) for path in found}


@dataclass(frozen=True)
class Workshop:
    """Cut sources with the options and the detector that all of them share."""

    options: CuttingOptions
    output: Path  # absolute
    shows_bars: bool
    clip_list: ClipList
    stop: Event = field(default_factory=Event)

    def cut(self, job: CuttingJob) -> CutResult:
        """Cut a video, or finish the work of an interrupted run. Raises UserError."""
        path, stem, record = job
        options = self.options
        why = "" if record is None else record.changes(path, options)
        if record is not None and record.is_done and not why:
            return CutResult(record, (), is_new=False)
        if record is None or why:
            if record is not None:
                self._check_untouched(path, record, why)
                logger.warning("%s is cut anew: %s", path, why)
            info = source_info(path)
            detector = load_detector(options.scenes)(float(info.rate))
            with contextlib.closing(self._frames(path, "scenes of")) as frames:
                look = look_at(info, frames, detector, options.choice.black_threshold)
            clips = plan_clips(look, options.lengths, options.choice)
            if options.dry_run:
                return CutResult(None, clips)
            new = start_record(path, stem, options, look, clips)
            if record is not None:
                self._check_untouched(path, record, why)  # again: reading takes long
            self._make_way(new, record)
            write_record(self.output, new)
            record = new
        else:
            clips = [one.clip for one in record.clips]
            logger.info("%s: going on where the last run ended", path)
        written = self._write_clips(path, record)
        if not record.is_of(path):
            raise MediaError(f"{path} has changed while it was cut. Run the same command again.")
        done = [replace(one, size_bytes=(self.output / one.name).stat().st_size) for one in record.clips]
        record = replace(record, clips=tuple(done), is_done=True)
        write_record(self.output, record)
        return CutResult(record, clips, written=written)

    def _check_untouched(self, source: Path, record: CutRecord, why: str) -> None:
        """Raise OutputError if a user has put work into the clips of an earlier cut.

        Work is a file beside a clip, a caption in the list, or a changed clip. why: reason to cut again.
        """
        sizes = {self.output / one.name: one.size_bytes for one in record.clips}
        there = [path for path in sizes if os.path.lexists(path)]
        stems = {path.stem for path in there}
        captioned = self.clip_list.captioned
        for words, touched in (
            (
                f"with a caption in {self.options.list_path.name}",
                [path for path in there if str(path) in captioned],
            ),
            (
                "with other files of their names beside them",
                sorted(path for path in self.output.iterdir() if path.stem in stems and path not in sizes),
            ),
            (
                "that were changed",
                [path for path in there if sizes[path] and path.stat().st_size != sizes[path]],
            ),
        ):
            if touched:
                raise OutputError(
                    f"{source} was cut in another way ({why}), and there are clips {words}, such as "
                    f"{touched[0].name}. Cutting anew would make them wrong: move them away, or choose "
                    "another --output."
                )

    def _frames(self, path: Path, what: str, deep: bool = False) -> Generator[Picture, None, None]:
        """Yield the pictures of a video, with a progress bar. Raises MediaError."""
        with Bar(source_info(path).frames, f"{what} {path.name}", FRAMES, self.shows_bars) as bar:
            for frame in shown_frames(path, deep):
                yield frame
                if self.stop.is_set():
                    raise CuttingStopped
                bar.update()

    def _make_way(self, new: CutRecord, old: CutRecord | None) -> None:
        """Remove the clips of an earlier cut and their lines; `_check_untouched` must have passed.

        Raises OutputError if a new clip would overwrite a file that is not ours.
        """
        ours = set() if old is None else {one.name for one in old.clips}
        names = [one.name for one in new.clips if os.path.lexists(self.output / one.name)]
        strangers = [name for name in names if name not in ours]
        if strangers:
            raise OutputError(
                f"{', '.join(strangers[:NAMED])} in {self.output} would be written, and there are files of "
                "these names that this command has not made. Move them away, or choose another --output."
            )
        if old is not None:
            # first, the record says that the clips are incomplete: after a kill, the next run continues
            write_record(self.output, replace(old, options={}, is_done=False, lists=()))
            self.clip_list.write(removed=[self.output / name for name in ours])
            for name in ours:
                (self.output / name).unlink(missing_ok=True)

    def _write_clips(self, source: Path, record: CutRecord) -> int:
        """Write the missing clips in one pass over the pictures; return how many.

        A clip gets its name when it is complete. Frames keep the times of the source, also at variable rates.
        Raises MediaError, OutputError.
        """
        clips = [(self.output / one.name, one.clip) for one in record.clips]
        missing = [(path, clip) for path, clip in clips if not os.path.lexists(path)]
        if not missing:
            return 0
        form, info = self.options.form, source_info(source)
        codec = settle_codec(form.codec, info.width, info.height)
        with contextlib.closing(self._frames(source, "clips of", form.is_deep)) as frames:
            numbered = enumerate(frames)
            for path, clip in missing:
                start, seconds = (Fraction(round(one * MICRO), MICRO) for one in (clip.start, clip.seconds))
                write_shown(
                    *(path, _frames_of(numbered, source, clip), info.rate, codec),
                    crf=form.crf,
                    preset=form.preset,
                    section_of=VideoSection(source, start, seconds, not form.no_audio),
                )
        return len(missing)


def _frames_of(frames: Iterator[tuple[int, Picture]], source: Path, clip: PlannedClip) -> Iterator[Picture]:
    """Yield the frames of a clip, timed from 0 s. Skips frames before it, and reads none after it."""
    origin: Fraction | None = None
    for number, frame in frames:
        if number < clip.first:
            continue
        origin = frame.start if origin is None else origin
        yield replace(frame, start=frame.start - origin)
        if number == clip.end - 1:
            return
    raise MediaError(f"{source} has changed while it was cut: it has fewer frames than before. Run again.")


def _each(
    jobs: Sequence[CuttingJob], shop: Workshop, failures: list[tuple[Path, Exception]]
) -> Iterator[tuple[Path, CutResult]]:
    """Yield each source and its result, in order; add errors to `failures`, logging those of several jobs."""
    pool = ThreadPoolExecutor(shop.options.num_workers, thread_name_prefix="cut")
    try:
        for job, future in [(job, pool.submit(shop.cut, job)) for job in jobs]:
            while not future.done():
                wait([future], WAIT_SECONDS)
            error = future.exception()
            if error is None:
                yield job[0], future.result()
            elif not isinstance(error, (UserError, OSError)):
                raise error
            else:
                failures.append((job[0], error))
                if len(jobs) > 1:
                    logger.error("%s is skipped: %s", job[0], error)
    finally:
        shop.stop.set()  # if this ends early, the threads stop at their next frame
        pool.shutdown(wait=True, cancel_futures=True)


def _scene_line(clip: PlannedClip) -> str:
    times = " to ".join(clock_time(Fraction(time)) for time in (clip.start, clip.start + clip.seconds))
    kept = f"left out: {clip.dropped}" if clip.dropped else "clip"
    return (
        f"  scene {clip.scene}, {times}, {clip.seconds:.3f} s, frames {clip.first} to {clip.end - 1} "
        f"({clip.frames}): {kept}"
    )


def _in_words(clips: Sequence[PlannedClip]) -> str:
    scenes = count_of(len({clip.scene for clip in clips}), "scene")
    left_out = _reasons(clips)
    kept = count_of(sum(not clip.dropped for clip in clips), "clip")
    return f"{scenes}, {kept}{f'; left out: {left_out}' if left_out else ''}"


def _reasons(clips: Sequence[PlannedClip]) -> str:
    counts = Counter(clip.dropped for clip in clips if clip.dropped)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
