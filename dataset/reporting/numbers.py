"""All numbers of the report as one JSON object; the page shows the same ones."""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dataset.checking.captions import NO_CAPTION
from dataset.checking.findings import count_batches
from dataset.config import DatasetConfig
from dataset.reporting.bins import count_bins, summarise
from dataset.reporting.captions import count_captions
from dataset.reporting.measuring import Measured
from dataset.reporting.tables import CANNOT_BE_READ, TableReport

PERCENT_DIGITS = 2
Numbers = dict[str, Any]


def collect_numbers(
    config: DatasetConfig,
    reports: Sequence[TableReport],
    copies: Sequence[Sequence[Path]],
    fps: float,
    pixel_step: int,
    decodes: bool,
) -> Numbers:
    """Return the report as JSON values.

    copies: groups of files that are nearly the same. decodes: False if only headers were read.
    """
    epoch = sum(report.items_per_epoch for report in reports)
    tables = [_table(report, epoch) for report in reports]
    sources = (source for report in reports for source in report.found.sources)
    return {
        "dataset_config": str(config.path),
        "decoded": decodes,
        "fps": fps,
        "pixel_step": pixel_step,
        "sources": sum(table["sources"] for table in tables),
        "items": sum(table["items"] for table in tables),
        "items_per_epoch": epoch,
        "batches_per_epoch": count_batches(report.found for report in reports if not report.table.validation),
        "tables": tables,
        "buckets": _all_buckets(reports),
        "broken": [
            {"path": path, "reason": reason, "table": report.table.index + 1}
            for report in reports
            for path, reason in _broken(report)
        ],
        "faults": [
            {"kind": fault.kind, "text": fault.text, "table": report.table.index + 1}
            for report in reports
            for fault in report.found.faults
            if fault.kind not in (CANNOT_BE_READ, NO_CAPTION)  # these have their own lists
        ],
        "remarks": [  # about files that no source uses
            {"kind": fault.kind, "text": fault.text, "table": report.table.index + 1}
            for report in reports
            for fault in report.found.remarks
            if fault.stem is None
        ],
        "captions": tables[0]["captions"] if len(tables) == 1 else count_captions(sources),
        "near_duplicates": [[str(path) for path in group] for group in copies],
        "black": _paths(reports, "is_black"),
        "static": _paths(reports, "is_static"),
        "blurred": _paths(reports, "is_blurred"),
        "without_items": [
            {"path": str(report.path(one)), "reason": one.none, "table": report.table.index + 1}
            for report in reports
            for one in report.measured
            if one.none is not None
        ],
        **_distributions([one for report in reports for one in report.measured]),
    }


def _table(report: TableReport, epoch: int) -> Numbers:
    table, found = report.table, report.found
    return {
        "name": table.place,
        "kind": table.kind,
        "source": str(table.source),
        "sources": len(found.sources),
        "items": found.num_items,
        "num_repeats": table.num_repeats,
        "items_per_epoch": report.items_per_epoch,
        "share_percent": _percent(report.items_per_epoch, epoch),
        "batch_size": table.batch_size,
        "batches_per_epoch": report.batches_per_epoch,
        "part_batches": sum(last < table.batch_size for *_, last in found.bucket_rows()),
        "resolution": list(table.resolution),
        "validation": table.validation,
        "broken": sum(1 for _ in _broken(report)),
        "without_items": sum(one.none is not None for one in report.measured),
        "buckets": [_bucket(report, *row) for row in found.bucket_rows()],
        "captions": count_captions(found.sources),
        **_distributions(report.measured),
    }


def _bucket(report: TableReport, key: tuple[int, ...], items: int, batches: int, last: int) -> Numbers:
    width, height, frames = _sizes(key)
    cut = report.crops[width, height].cut
    return {
        "width": width,
        "height": height,
        "frames": frames,
        "items": items,
        "batches_per_epoch": batches,
        "last_batch": last,
        "cut_percent_mean": round(statistics.fmean(cut), PERCENT_DIGITS),
        "cut_percent_max": round(max(cut), PERCENT_DIGITS),
    }


def _all_buckets(reports: Iterable[TableReport]) -> list[Numbers]:
    """Return the items of all tables by size."""
    total: Counter[tuple[int, int, int]] = Counter()
    for report in reports:
        for key, count in report.found.buckets.items():
            total[_sizes(key)] += count
    return [
        {"width": width, "height": height, "frames": frames, "items": items}
        for (width, height, frames), items in sorted(total.items())
    ]


def _sizes(key: tuple[int, ...]) -> tuple[int, int, int]:
    return key[0], key[1], key[2] if len(key) > 2 else 1


def _broken(report: TableReport) -> Iterator[tuple[str, str]]:
    """Yield path and reason of the files of a table that cannot be read."""
    for one in report.measured:
        if one.problem is not None:
            yield str(report.path(one)), one.problem


def _paths(reports: Iterable[TableReport], measure: str) -> list[str]:
    """Return the files with a true measure, each once."""
    found = (
        str(report.path(one))
        for report in reports
        for one in report.measured
        if one.measures is not None and getattr(one.measures, measure)
    )
    return list(dict.fromkeys(found))


def _distributions(measured: Sequence[Measured]) -> Numbers:
    """Return durations, rates, sizes and measures of sources that can be read."""
    seconds = [one.seconds for one in measured if one.seconds is not None]
    rates = Counter(round(one.fps, 3) for one in measured if one.fps)
    sizes = Counter(one.size for one in measured if one.size is not None and one.problem is None)
    found: Numbers = {
        "durations": {"seconds": summarise(seconds), "histogram": count_bins(seconds)},
        "rates": [{"fps": rate, "count": count} for rate, count in sorted(rates.items())],
        "resolutions": [
            {"width": width, "height": height, "count": count}
            for (width, height), count in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
        ],
    }
    measures = [one.measures for one in measured if one.measures is not None]
    for name in ("brightness", "sharpness"):
        values = [getattr(one, name) for one in measures]
        found[name] = {"values": summarise(values), "histogram": count_bins(values)}
    moving = [one.motion for one in measures if len(one.hashes) > 1]
    found["motion"] = {"values": summarise(moving), "histogram": count_bins(moving)}
    return found


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, PERCENT_DIGITS) if whole else 0.0
