"""Cut all videos that a command selects, several at once if requested, and list their clips."""

import contextlib
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from threading import Event

from data_tools.cutting.clips import PlannedClip, analyze_video, plan_clips
from data_tools.cutting.records import (
    RECORD_FOLDER,
    ClipList,
    CutRecord,
    CuttingOptions,
    read_records,
    start_record,
    write_record,
)
from data_tools.cutting.scenes import SceneDetector
from dataset.caching.prefetch import Failure, failure_error
from dataset.sources.media_source import readable_stem
from modules.atomic_write import make_folder
from modules.bars import FRAMES, Bar
from modules.console import Row, format_count, format_duration, show_box
from modules.control_codes import escape_control_codes
from modules.errors import DatasetError, MediaError, OptionError, OutputError, UserError
from modules.media.encoding import OutputFrame, resolve_codec
from modules.media.measures import clock_time
from modules.media.reading import VIDEO_SUFFIXES
from modules.media.streams import shown_frames, source_info
from modules.media.writing import VideoSection, write_timed_video
from modules.text_files import bad_character, real_path

logger = logging.getLogger(__name__)

# footage also comes from phones, cameras and broadcasts, in formats that datasets do not take
SUFFIXES = VIDEO_SUFFIXES | {".3gp", ".mts", ".m2ts", ".ts", ".vob", ".ogv"}
POLL_SECONDS = 0.5  # on Windows, Ctrl-C is noticed only between waits
MAX_NAMED_FILES = 3  # maximum number of files named in a message
MICROSECONDS = 1_000_000  # in a second; times of clips are rounded to microseconds


@dataclass(frozen=True)
class CuttingJob:
    """A source video to cut, with the common start of its clips' file names."""

    source: Path  # absolute
    stem: str  # beginning of the names of its clips
    record: CutRecord | None  # of an earlier run


class CuttingStopped(Exception):
    """Raised in a cutting thread when the run ends early."""


@dataclass(frozen=True)
class CutResult:
    """Clips of one source video, and whether they were cut in this run."""

    record: CutRecord | None  # None: a dry run
    clips: Sequence[PlannedClip]  # including those that are left out
    is_new: bool = True  # whether anything was to be done
    num_written: int = 0  # clips written in this run


def cut_footage(options: CuttingOptions) -> None:
    """Cut all videos that the options select into clips, and write the list of clips.

    Raises:
        UserError: If an option or the folder cannot be used; at the end, if sources could not be cut.
    """
    started = time.monotonic()
    sources = find_videos(options.input, options.output)
    output = real_path(options.output)
    list_path = real_path(options.list_path)
    if bad_character(str(output)):
        raise OptionError(f"--output {ascii(str(output))}: the list of clips cannot hold this name")
    records = {} if options.dry_run else read_records(output)
    jobs = _plan_jobs(sources, records)
    if not options.dry_run:
        make_folder(output, "--output")
        make_folder(list_path.parent, "--jsonl")
    shows_bars = options.num_workers == 1 or len(jobs) == 1  # bars of several threads would mix
    cutter = Cutter(options, output, shows_bars, ClipList(list_path, output))
    results, failures = _cut_and_list(jobs, cutter)
    if results and not options.dry_run:
        _show_results(results, list_path, seconds=time.monotonic() - started)
    if failures:
        if len(sources) == 1:  # a single source raises its own error
            _, error = failures[0]
            raise error if isinstance(error, UserError) else DatasetError(str(error)) from error
        failed_sources = [
            Failure(path, reason=str(error), table=0, stem=path.stem) for path, error in failures
        ]
        raise failure_error(failed_sources, format_count(len(sources), "video"))


def _cut_and_list(
    jobs: Sequence[CuttingJob], cutter: "Cutter"
) -> tuple[list[CutResult], list[tuple[Path, Exception]]]:
    """Cut videos and write the list of their clips; return the results, and the videos that failed."""
    # If the run is stopped, the list contains the clips so far.
    results: list[CutResult] = []
    failures: list[tuple[Path, Exception]] = []
    try:
        for source, result in _cut_all(jobs, cutter):
            if isinstance(result, Exception):
                failures.append((source, result))
                continue
            results.append(result)
            # in a dry run, the clips are printed
            # numbers of scenes, clips, and clips left out for each reason
            scenes = format_count(len({clip.scene for clip in result.clips}), "scene")
            written = format_count(sum(not clip.dropped for clip in result.clips), "clip")
            reasons = _describe_reasons(result.clips)
            left_out = f"; left out: {reasons}" if reasons else ""
            counts = f"{scenes}, {written}{left_out}"
            summary = f"{source}: {counts}"
            is_dry_run = result.record is None
            if is_dry_run:
                lines = [summary, *map(_format_scene_line, result.clips)]
                sys.stdout.write(escape_control_codes("\n".join(lines)) + "\n")
            elif result.is_new:
                logger.info("%s", summary)
            if result.record is not None:
                cutter.clip_list.add(result.record, result.is_new)
    finally:
        cutter.clip_list.write()
    return results, failures


def _plan_jobs(stems: Mapping[Path, str], records: Mapping[str, CutRecord]) -> list[CuttingJob]:
    """Return a cutting job for each source video, with file names that no other source uses."""
    # `stems` maps each source to the preferred stem of its clips; a number is appended if it is already used.
    # without capitals, because file systems of Windows and macOS ignore them
    used_stems = {record.stem.casefold() for record in records.values()}
    jobs = []
    for path, wanted_stem in stems.items():
        record = records.get(str(path))
        if record is not None:
            stem = record.stem
        else:
            stem = wanted_stem
            number = 1
            while stem.casefold() in used_stems:
                number += 1
                stem = f"{wanted_stem}-{number}"
        used_stems.add(stem.casefold())
        jobs.append(CuttingJob(path, stem, record))
    return jobs


def _show_results(results: Sequence[CutResult], list_path: Path, seconds: float) -> None:
    """Print the numbers of sources cut and of clips written."""
    new = [result for result in results if result.is_new]
    num_clips = sum(len(result.record.clips) for result in results if result.record is not None)
    num_written = sum(result.num_written for result in new)
    rows: list[Row] = [
        ("videos", f"{len(new)} cut, {len(results) - len(new)} done before"),
        ("clips", f"{num_clips}, {num_written} of them written now"),
        ("left out", _describe_reasons([clip for result in new for clip in result.clips])),
        ("time", format_duration(seconds)),
        ("list", f'video_jsonl_file = "{list_path.as_posix()}"'),
    ]
    show_box("Cutting is finished", rows)


def find_videos(path: Path, output: Path) -> dict[Path, str]:
    """Return all videos below a folder, each with a unique stem for the names of its clips.

    The stem is made of the path below the folder. Videos in `output`, and in other folders that clips were
    cut into, are left out. `path` may also be a single video.

    Raises:
        MediaError: If no video is found.
    """
    if not path.is_dir():
        return {real_path(path): readable_stem(path.stem)}
    root = real_path(path)
    videos = list(_walk_videos(root, real_path(output)))
    if not videos:
        raise MediaError(
            f"--input {path} is a folder without videos (clips of this command do not count). Their names "
            f"end in {', '.join(sorted(SUFFIXES))}."
        )
    stems = {}
    for video in videos:
        path_parts = video.relative_to(root).with_suffix("").parts
        stems[video] = readable_stem("_".join(path_parts))
    return stems


def _walk_videos(root: Path, output: Path) -> Iterator[Path]:
    """Yield the visible videos below a folder, except those in `output` and other folders of clips."""
    for walked, folders, names in os.walk(root):
        folder = Path(walked)
        # os.walk only enters the folders that stay in this list
        folders[:] = sorted(name for name in folders if not name.startswith(".") and folder / name != output)
        if folder != root and (folder / RECORD_FOLDER).is_dir():
            continue  # a folder of clips that were cut before
        for name in sorted(names):
            file = folder / name
            if not name.startswith(".") and file.suffix.lower() in SUFFIXES and file.is_file():
                yield file


@dataclass(frozen=True)
class Cutter:
    """Cut videos into clips; all threads share the options, the output folder and the list of clips."""

    options: CuttingOptions
    output: Path  # absolute
    shows_bars: bool
    clip_list: ClipList
    stop: Event = field(default_factory=Event)

    def cut(self, job: CuttingJob) -> CutResult:
        """Cut a video into clips, or finish the cut of an interrupted run.

        Raises UserError if the video cannot be read or a clip cannot be written.
        """
        if job.record is None:
            return self._cut_anew(job, reason_to_recut="")
        reason_to_recut = job.record.find_reason_to_recut(job.source, self.options)
        if reason_to_recut:
            self._reject_edited_clips(job.source, job.record, reason_to_recut)
            logger.warning("%s is cut again: %s", job.source, reason_to_recut)
            return self._cut_anew(job, reason_to_recut)
        if job.record.is_done:
            return CutResult(job.record, (), is_new=False)
        logger.info("%s: continuing where the last run ended", job.source)
        clips = [clip_record.clip for clip_record in job.record.clips]
        return self._write_recorded_clips(job.source, job.record, clips)

    def _cut_anew(self, job: CuttingJob, reason_to_recut: str) -> CutResult:
        """Find the clips of a video, and write them, except in a dry run."""
        # the video is decoded once for its frame times, scene changes and measures
        info = source_info(job.source)
        detector = SceneDetector(self.options.scenes.scene_threshold, float(info.rate))
        with contextlib.closing(self._decode_frames(job.source, "scenes of")) as frames:
            analysis = analyze_video(info, frames, detector, self.options.choice.black_threshold)
        clips = plan_clips(analysis, self.options.lengths, self.options.choice)
        if self.options.dry_run:
            return CutResult(None, clips)
        record = start_record(job.source, job.stem, self.options, analysis=analysis, clips=clips)
        if job.record is not None:
            # checked again, because reading took long enough for a user to change clips
            self._reject_edited_clips(job.source, job.record, reason_to_recut)
        self._remove_old_clips(record, job.record)
        write_record(self.output, record)
        return self._write_recorded_clips(job.source, record, clips)

    def _write_recorded_clips(
        self, source: Path, record: CutRecord, clips: Sequence[PlannedClip]
    ) -> CutResult:
        """Write the clips of a record that do not exist yet, and finish the record."""
        num_written = self._write_clips(source, record)
        if not record.is_unchanged(source):
            raise MediaError(f"{source} has changed while it was cut. Run the same command again.")
        written_clips = []
        for clip in record.clips:
            size_bytes = (self.output / clip.name).stat().st_size
            written_clips.append(replace(clip, size_bytes=size_bytes))
        record = replace(record, clips=tuple(written_clips), is_done=True)
        write_record(self.output, record)
        return CutResult(record, clips, num_written=num_written)

    def _reject_edited_clips(self, source: Path, record: CutRecord, why: str) -> None:
        """Raise OutputError if a user has edited the clips of an earlier cut, before the source is cut again.

        `why` is the reason for cutting again.
        """
        for edit, paths in self._find_edited_clips(record).items():
            if paths:
                raise OutputError(
                    f"{source} was cut with other options ({why}), and there are clips {edit}, such as "
                    f"{paths[0].name}. Cutting again would invalidate them: move them away, or choose "
                    "another --output."
                )

    def _find_edited_clips(self, record: CutRecord) -> dict[str, list[Path]]:
        """Return the clips of a record that a user has edited, by a description of the edit."""
        # Edits are a file next to a clip, a caption in the list of clips, or a clip of a different size.
        recorded_sizes = {self.output / clip.name: clip.size_bytes for clip in record.clips}
        clips = [path for path in recorded_sizes if os.path.lexists(path)]
        clip_stems = {path.stem for path in clips}
        captioned_paths = self.clip_list.captioned_paths
        captioned = [path for path in clips if str(path) in captioned_paths]
        companions = [
            path for path in self.output.iterdir() if path.stem in clip_stems and path not in recorded_sizes
        ]
        changed = []
        for path in clips:
            size_bytes = recorded_sizes[path]
            # an interrupted cut has recorded 0 bytes, which cannot be compared
            if size_bytes and path.stat().st_size != size_bytes:
                changed.append(path)
        return {
            f"with a caption in {self.options.list_path.name}": captioned,
            "with other files of their names next to them": sorted(companions),
            "that were changed": changed,
        }

    def _decode_frames(self, path: Path, what: str, deep: bool = False) -> Generator[OutputFrame, None, None]:
        """Yield the frames of a video, with a progress bar. Raises MediaError if one cannot be decoded."""
        with Bar(source_info(path).frames, f"{what} {path.name}", FRAMES, self.shows_bars) as bar:
            for frame in shown_frames(path, deep):
                yield frame
                if self.stop.is_set():
                    raise CuttingStopped
                bar.update()

    def _remove_old_clips(self, new: CutRecord, old: CutRecord | None) -> None:
        """Remove the clips of an earlier cut and their lines in the list, after `_reject_edited_clips`."""
        old_names = set() if old is None else {clip.name for clip in old.clips}  # may be replaced
        existing_names = [clip.name for clip in new.clips if os.path.lexists(self.output / clip.name)]
        foreign_names = [name for name in existing_names if name not in old_names]
        if foreign_names:
            raise OutputError(
                f"{', '.join(foreign_names[:MAX_NAMED_FILES])} in {self.output} would be written, and there "
                "are files of these names that this command has not made. Move them away, or choose another "
                "--output."
            )
        if old is not None:
            # first, the old record loses its options: if this run is killed, the next one cuts again
            write_record(self.output, replace(old, options={}, is_done=False, lists=()))
            self.clip_list.write(removed=[self.output / name for name in old_names])
            for name in old_names:
                (self.output / name).unlink(missing_ok=True)

    def _write_clips(self, source: Path, record: CutRecord) -> int:
        """Write the clips of a video that do not exist yet, in one pass over its frames."""
        # Return their number.
        # A clip gets its name when it is complete. Frames keep the times of the source, also at variable
        # rates.
        missing_records = [
            clip_record for clip_record in record.clips if not os.path.lexists(self.output / clip_record.name)
        ]
        if not missing_records:
            return 0
        video_format = self.options.clip_format
        info = source_info(source)
        codec = resolve_codec(video_format.codec, info.width, info.height)
        with contextlib.closing(self._decode_frames(source, "clips of", video_format.is_deep)) as frames:
            numbered_frames = enumerate(frames)
            for clip_record in missing_records:
                clip = clip_record.clip
                # records store seconds as floats; fractions of microseconds are exact
                start = Fraction(round(clip.start * MICROSECONDS), MICROSECONDS)
                seconds = Fraction(round(clip.seconds * MICROSECONDS), MICROSECONDS)
                write_timed_video(
                    self.output / clip_record.name,
                    _read_clip_frames(numbered_frames, source, clip),
                    info.rate,
                    codec,
                    crf=video_format.crf,
                    preset=video_format.preset,
                    audio_section=VideoSection(source, start, seconds, not video_format.no_audio),
                )
        return len(missing_records)


def _read_clip_frames(
    frames: Iterator[tuple[int, OutputFrame]], source: Path, clip: PlannedClip
) -> Iterator[OutputFrame]:
    """Yield the frames of a planned clip, with times that start at 0; no later frame is read."""
    origin: Fraction | None = None
    for number, frame in frames:
        if number < clip.first:
            continue
        origin = frame.start if origin is None else origin
        yield replace(frame, start=frame.start - origin)
        if number == clip.end - 1:
            return
    raise MediaError(f"{source} has changed while it was cut: it has fewer frames than before. Run again.")


def _cut_all(
    jobs: Sequence[CuttingJob], cutter: Cutter
) -> Iterator[tuple[Path, CutResult | UserError | OSError]]:
    """Cut all jobs in threads; yield (source, result or error) in order."""
    pool = ThreadPoolExecutor(cutter.options.num_workers, thread_name_prefix="cut")
    try:
        futures = [pool.submit(cutter.cut, job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            # short waits, so that Ctrl-C is noticed on Windows
            while not future.done():
                wait([future], POLL_SECONDS)
            error = future.exception()
            if error is None:
                yield job.source, future.result()
            elif not isinstance(error, (UserError, OSError)):
                raise error
            else:
                if len(jobs) > 1:
                    logger.error("%s is skipped: %s", job.source, error)
                yield job.source, error
    finally:
        cutter.stop.set()  # if this ends early, the threads stop at their next frame
        pool.shutdown(wait=True, cancel_futures=True)


def _format_scene_line(clip: PlannedClip) -> str:
    """Return a line on a planned clip, with its times and, if it is left out, the reason."""
    start = clock_time(Fraction(clip.start))
    end = clock_time(Fraction(clip.start + clip.seconds))
    status = f"left out: {clip.dropped}" if clip.dropped else "clip"
    return (
        f"  scene {clip.scene}, {start} to {end}, {clip.seconds:.3f} s, "
        f"frames {clip.first} to {clip.end - 1} ({clip.frames}): {status}"
    )


def _describe_reasons(clips: Sequence[PlannedClip]) -> str:
    """Return the number of clips left out for each reason, the most frequent reason first, as text."""
    counts = Counter(clip.dropped for clip in clips if clip.dropped)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
