"""Report the results of a caching run."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.sources.media_source import MediaSource
from modules.console import Row, show_box
from modules.errors import DatasetError

logger = logging.getLogger(__name__)

NAMED = 3  # how many of the clips that give fewer items


@dataclass(frozen=True)
class Failure:
    """A source that gave no item, and the reason."""

    path: Path
    reason: str
    table: int
    stem: str

    @staticmethod
    def of(source: MediaSource, reason: object) -> "Failure":
        """Make the failure of a source. reason: a text or the exception."""
        return Failure(source.path, str(reason), source.table.index, source.stem)

    def __str__(self) -> str:
        return self.reason if str(self.path) in self.reason else f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class CacheReport:
    """Results of a run. Counts are numbers of cache files."""

    written: int = 0
    kept: int = 0
    # files in use that another program made, at least in part: they have no record
    foreign: int = 0
    removed: int = 0
    failures: tuple[Failure, ...] = ()  # sources that could not be read
    dropped: tuple[Failure, ...] = ()  # sources that can be read but give no item
    shortened: tuple[Failure, ...] = ()  # clips too short for some of target_frames
    share: int = 0  # how many of the sources or captions this run looked at
    whole: int = 0  # how many there are
    is_main: bool = True  # whether this process reports for all


def join_reports(reports: Sequence[CacheReport], removed: int = 0, is_main: bool = True) -> CacheReport:
    """Join the reports of several processes to one."""

    def all_of(name: str) -> tuple[Failure, ...]:
        found = [one for report in reports for one in getattr(report, name)]
        return tuple(sorted(found, key=lambda failure: str(failure.path)))

    return CacheReport(
        written=sum(report.written for report in reports),
        kept=sum(report.kept for report in reports),
        foreign=sum(report.foreign for report in reports),
        removed=removed,
        failures=all_of("failures"),
        dropped=all_of("dropped"),
        shortened=all_of("shortened"),
        share=sum(report.share for report in reports),
        whole=max((report.whole for report in reports), default=0),
        is_main=is_main,
    )


def conclude(report: CacheReport, rows: Sequence[Row] = (), commands: Sequence[Row] = ()) -> None:
    """Show the results. rows, commands: further lines of the box.

    Raises DatasetError if a source failed; in processes other than the main one, SystemExit with its code.
    """
    if not report.is_main:
        if report.failures:
            raise SystemExit(DatasetError.exit_code)
        return
    if report.dropped:
        lines = "\n  ".join(map(str, report.dropped))
        logger.warning("%d sources give no item and are not trained on:\n  %s", len(report.dropped), lines)
    if report.shortened:
        logger.warning(
            "%d clips give no item of some lengths. The first: %s",
            len(report.shortened),
            "; ".join(map(str, report.shortened[:NAMED])),
        )
    if report.foreign:
        logger.warning(
            "%d files were made by another program: only their sizes could be compared (--skip_existing)",
            report.foreign,
        )
    if report.written or report.kept or report.removed or report.share < report.whole:
        files = f"{report.written} written, {report.kept} kept, {report.removed} removed"
        show_box("Caching is finished", [("cache files", files), *rows], () if report.failures else commands)
    if report.failures:
        raise failure_error(report.failures, "sources")
    if report.dropped and not report.written and not report.kept and report.share == report.whole:
        raise DatasetError(
            f"not one of the {report.whole} sources gives an item to train on: the lines above say why. "
            "Lower target_frames, or use longer clips"
        )


def failure_error(failures: Sequence[Failure], things: str) -> DatasetError:
    """Return the error at the end of a run for its failures. things: a word for them."""
    lines = "\n  ".join(map(str, failures))
    return DatasetError(
        f"{len(failures)} of the {things} could not be used; all others are done:\n  {lines}\n"
        "  Repair or remove these files, then run the same command again."
    )
