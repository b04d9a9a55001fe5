"""Read the tables of a dataset for the report: their sources, items and remarks."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dataset.check import UNUSABLE, find_table
from dataset.checking.captions import Counters, check_captions
from dataset.checking.findings import TableFindings, balance
from dataset.config import DatasetConfig, DatasetTable
from dataset.reporting.copies import group_copies
from dataset.reporting.measuring import Measured, measure_all
from dataset.sources.decoding import check_resolution
from dataset.sources.faults import Fault
from dataset.sources.steps import Steps
from modules.errors import DatasetError
from modules.media.buckets import Fit

NO_COUNTERS = Counters(())
CANNOT_BE_READ = "cannot be read"


@dataclass
class Crops:
    """How sources were fitted to one bucket."""

    fits: Counter[Fit] = field(default_factory=Counter)  # sources by how they are resized and cropped
    cut: list[float] = field(default_factory=list)  # percent of the picture, of each source


@dataclass
class TableReport:
    """A table: its sources, findings, and the numbers of each source."""

    found: TableFindings
    measured: list[Measured]
    crops: dict[tuple[int, int], Crops]  # by bucket

    @property
    def table(self) -> DatasetTable:
        return self.found.table

    @property
    def items_per_epoch(self) -> int:
        """Return how often an epoch shows an item of it; nothing of a table for validation."""
        return 0 if self.table.validation else self.found.items_per_epoch

    @property
    def batches_per_epoch(self) -> int:
        return 0 if self.table.validation else self.found.num_batches

    def path(self, one: Measured) -> Path:
        """Return the path of a source."""
        return self.found.sources[one.place].path


def read_tables(
    config: DatasetConfig, fps: float, steps: Steps, decodes: bool, workers: int
) -> tuple[list[TableReport], list[list[Path]]]:
    """Read all sources once. Returns the tables, and groups of files that are nearly the same.

    fps: the model's rate. Raises DatasetError if no table has a source.
    """
    reports = [_read_table(config, table, fps, steps, decodes, workers) for table in config.datasets]
    if not any(report.found.sources for report in reports):
        faults = [fault.text for report in reports for fault in report.found.faults]
        raise DatasetError("\n  ".join([f"{config.path}: there is nothing to report on", *faults]))
    balance([report.found for report in reports])
    copies = [group for kind in ("image", "video") for group in _copies(reports, kind)]
    _tell_copies(reports, copies)
    return reports, copies


def _read_table(
    config: DatasetConfig, table: DatasetTable, fps: float, steps: Steps, decodes: bool, workers: int
) -> TableReport:
    found = find_table(config, table)
    report = TableReport(found, [], {})
    if not found.sources:
        return report
    check_captions(found, NO_COUNTERS)
    try:
        check_resolution(table, steps.pixel_step)
    except DatasetError as error:
        found.faults.append(Fault(UNUSABLE, str(error)))
        return report
    fits: dict[Fit | None, Fit | None] = {}  # each once: there are few
    for measured in measure_all(found.sources, fps, steps, decodes, workers):
        one = dataclasses.replace(measured, fit=fits.setdefault(measured.fit, measured.fit))
        report.measured.append(one)
        _count(report, one)
    return report


def _count(report: TableReport, one: Measured) -> None:
    """Add the items of a source to its buckets, and remarks to the findings."""
    found, source = report.found, report.found.sources[one.place]
    if one.problem is not None:
        line = one.problem if str(source.path) in one.problem else f"{source.path}: {one.problem}"
        found.faults.append(Fault(CANNOT_BE_READ, line, source.stem))
        return
    assert one.fit is not None  # what can be read has a size
    bucket = one.fit.bucket
    for length, count in one.lengths:
        found.buckets[bucket if report.table.kind == "image" else (*bucket, length)] += count
    if one.items:
        crops = report.crops.setdefault(bucket, Crops())
        crops.fits[one.fit] += 1
        crops.cut.append(one.cut_percent)
    measures = one.measures
    told = {
        "give no item": one.none,
        "give no item of some lengths": one.short,
        "are black": "black" if measures and measures.is_black else None,
        "do not move": "nothing moves" if measures and measures.is_static else None,
        "are blurred": f"blurred: sharpness {measures.sharpness:g}"
        if measures and measures.is_blurred
        else None,
    }
    found.remarks += [Fault(kind, text, source.stem) for kind, text in told.items() if text is not None]


def _copies(reports: Sequence[TableReport], kind: str) -> list[list[Path]]:
    """Return groups of files of a kind that are nearly the same. A file of several tables counts once."""
    by_path = {}
    places: set[Path] = set()  # one table may name a file by a relative path, another one by an absolute one
    for report in reports:
        for one in report.measured if report.table.kind == kind else ():
            path = report.path(one)
            if one.measures is not None and path.absolute() not in places:
                places.add(path.absolute())
                by_path[path] = one.measures
    files = sorted(by_path, key=str)
    by_length: dict[int, list[Path]] = {}  # clips of one frame have one hash
    for path in files:
        by_length.setdefault(len(by_path[path].hashes), []).append(path)
    groups = [
        [paths[place] for place in group]
        for _, paths in sorted(by_length.items())
        for group in group_copies([by_path[path] for path in paths])
    ]
    return sorted(groups, key=lambda group: str(group[0]))


def _tell_copies(reports: Sequence[TableReport], copies: Sequence[Sequence[Path]]) -> None:
    """Add a remark for each file of a group."""
    group_of = {path.absolute(): group for group in copies for path in group}
    for report in reports:
        for source in report.found.sources:
            own = source.path.absolute()
            group = group_of.get(own)
            if group is not None:
                other = next(path for path in group if path.absolute() != own)
                more = f" and {len(group) - 2} more" if len(group) > 2 else ""
                text = f"nearly the same as {other.name}{more}"
                report.found.remarks.append(Fault("are nearly the same as another", text, source.stem))
