"""Cut one video: find its scenes, choose clips, write them, and keep a record of that."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

from data_tools.cutting.changes import ChangeDetector
from data_tools.cutting.clip_list import ClipList
from data_tools.cutting.inputs import FootageSource
from data_tools.cutting.looking import VideoLook, look_at
from data_tools.cutting.options import CuttingOptions
from data_tools.cutting.planning import PlannedClip, plan_clips
from data_tools.cutting.records import CutRecord, changed_options, finish_record, start_record, write_record
from data_tools.cutting.writing import write_clips
from modules.bars import FRAMES, Bar
from modules.console import count_of
from modules.errors import MediaError, OutputError
from modules.media.streams import source_info

logger = logging.getLogger(__name__)

NAMED = 3  # files that a message names


class CuttingStopped(Exception):
    """End of work that another thread asked for."""


@dataclass(frozen=True)
class CuttingJob:
    """A source, the name of its clips, and the record of an earlier run."""

    source: FootageSource
    stem: str
    record: CutRecord | None


@dataclass(frozen=True)
class Result:
    """Result for a source."""

    record: CutRecord | None  # None: of a dry run
    clips: tuple[PlannedClip, ...]  # those that are left out too; empty if nothing was to be done
    written: int = 0  # clips of this run
    is_new: bool = True  # whether anything was to be done


@dataclass(frozen=True)
class Workshop:
    """Tools that all sources are cut with."""

    options: CuttingOptions
    output: Path  # absolute
    make: Callable[[float], ChangeDetector]
    stop: Event
    shows_bars: bool

    def look(self, source: Path) -> VideoLook:
        """Look at a video."""
        with self._bar(source, "scenes of") as bar:
            return look_at(source, self.make, self.options.choice.black_threshold, self._seen(bar))

    def write(self, source: Path, clips: Sequence[tuple[Path, PlannedClip]]) -> int:
        """Write clips of a video."""
        with self._bar(source, "clips of") as bar:
            return write_clips(source, clips, self.options.form, self._seen(bar))

    def _bar(self, source: Path, what: str) -> Bar:
        return Bar(source_info(source).frames, f"{what} {source.name}", FRAMES, self.shows_bars)

    def _seen(self, bar: Bar) -> Callable[[], None]:
        def seen() -> None:
            if self.stop.is_set():
                raise CuttingStopped
            bar.update()

        return seen


def check_old_clips(job: CuttingJob, shop: Workshop, known: ClipList) -> list[Path]:
    """Return the clips of an earlier cut that have to go, because options or the source are others now.

    Raises OutputError if a user has put work into them: captions beside them or in the list, another file.
    """
    record = job.record
    if record is None or _is_valid(record, job.source.path, shop.options):
        return []
    there = [shop.output / one.name for one in record.clips]
    there = [path for path in there if os.path.lexists(path)]
    sizes = {shop.output / one.name: one.size_bytes for one in record.clips}
    touched = [path for path in there if sizes[path] and path.stat().st_size != sizes[path]]
    beside = [path for path in _beside(there, shop.output) if path not in there]
    captioned = [path for path in there if "caption" in (known.line_of(path) or {})]
    if touched or beside or captioned:
        work = (
            f"{count_of(len(captioned), 'clip')} with a caption in {shop.options.list_path.name}, such as "
            f"{captioned[0].name}"
            if captioned
            else f"files that belong to its clips, such as {beside[0].name}"
            if beside
            else f"clips that were changed, such as {touched[0].name}"
        )
        raise OutputError(
            f"{job.source.path} was cut in another way ({_why(record, job.source.path, shop.options)}), and "
            f"there are {work}. Cutting anew would make them wrong: move them away, or choose another "
            "--output."
        )
    return there


def cut_video(job: CuttingJob, shop: Workshop) -> Result:
    """Cut a video, or finish the work of an interrupted run. Raises UserError."""
    record, path, options = job.record, job.source.path, shop.options
    if record is not None and _is_valid(record, path, options):
        if record.is_done:
            return Result(record, (), is_new=False)
        clips: tuple[PlannedClip, ...] = tuple(one.clip for one in record.clips)
        logger.info("%s: going on where the last run ended", path)
    else:
        if record is not None:
            logger.warning("%s is cut anew: %s", path, _why(record, path, options))
        look = shop.look(path)
        clips = tuple(plan_clips(look, options.lengths, options.choice))
        if options.dry_run:
            return Result(None, clips)
        new = start_record(job.source, job.stem, options, look, clips)
        _refuse_strangers(new, record, shop.output)
        if record is not None:
            _remove_old(record, shop.output)
        write_record(shop.output, new)
        record = new
    written = shop.write(path, [(shop.output / one.name, one.clip) for one in record.clips])
    if not record.is_of(path):
        raise MediaError(f"{path} has changed while it was cut. Run the same command again.")
    record = finish_record(shop.output, record)
    write_record(shop.output, record)
    return Result(record, clips, written)


def _is_valid(record: CutRecord, source: Path, options: CuttingOptions) -> bool:
    return record.is_of(source) and not changed_options(record, options)


def _why(record: CutRecord, source: Path, options: CuttingOptions) -> str:
    changed = changed_options(record, options)
    return ", ".join(changed) if changed else "the file is another one" if not record.is_of(source) else ""


def _refuse_strangers(new: CutRecord, old: CutRecord | None, output: Path) -> None:
    """Raise OutputError if a clip would take the name of a file that is not ours."""
    ours = set() if old is None else {one.name for one in old.clips}
    names = [one.name for one in new.clips if one.name not in ours and os.path.lexists(output / one.name)]
    if names:
        raise OutputError(
            f"{', '.join(names[:NAMED])} in {output} would be written, and there are files of these names "
            "that this command has not made. Move them away, or choose another --output."
        )


def _remove_old(record: CutRecord, output: Path) -> None:
    """Remove the clips of an earlier cut; `check_old_clips` has found nothing in them that is a user's.

    First of all the record says that they are not complete: a run that ends here is followed by another.
    """
    write_record(output, replace(record, options={}, is_done=False, lists=()))
    for one in record.clips:
        (output / one.name).unlink(missing_ok=True)


def _beside(clips: Sequence[Path], output: Path) -> list[Path]:
    """Return other files with the names of clips, such as their captions."""
    stems = {path.stem for path in clips}
    return sorted(path for path in output.iterdir() if path.stem in stems) if stems else []
