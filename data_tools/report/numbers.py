"""Collect all numbers of the report as one JSON object, which the page shows too."""

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.report.audio import count_tracks
from data_tools.report.findings import (
    NO_CAPTION,
    TableFindings,
    count_batches,
    count_references,
    has_unreadable_caption,
)
from data_tools.report.looks import Inspection, cut_percent
from dataset.config import DatasetConfig
from dataset.sources.media_source import Fault, MediaSource
from modules.control_codes import shorten
from modules.media.buckets import Fit, Size

CANNOT_BE_READ = "cannot be read"
MAX_BINS = 16
DIGITS, PERCENT_DIGITS = 6, 2
MAX_WORDS = 60  # number of the most frequent words that are listed
MAX_DUPLICATES = 200  # number of repeated texts that are listed
MAX_PATHS = 20  # number of paths that are listed for a text
SHOWN_TEXT = 300  # characters of a text that occurs more than once
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")

# English words that say nothing about an image; in other languages all words are counted
_STOP_WORDS = """
a about above after again against all along also am an and any are around as at be because been before behind
being below between both but by can could did do does doing down during each either else etc every few for
from further had has have having he her here hers herself him himself his how i if in into is it it's its
itself just like made make makes more most near next no nor not of off on once one only onto or other our out
over own same she should so some such than that the their them then there these they this those through to
together too toward towards under until up upon very was we were what when where which while who whom whose
why will with within without would you your
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
JsonObject = dict[str, Any]


def collect_statistics(
    config: DatasetConfig,
    tables: Sequence[TableFindings],
    copies: Sequence[Sequence[Path]],
    fps: float,
    pixel_step: int,
    decodes: bool,
) -> JsonObject:
    """Return all results of the report as JSON values.

    `copies` are groups of near duplicates. `decodes` is False if only headers were read.
    """
    items_per_epoch = sum(map(_count_items_per_epoch, tables))
    by_table = [_describe_table(findings, items_per_epoch) for findings in tables]
    if len(by_table) == 1:  # counted already
        captions = by_table[0]["captions"]
    else:
        captions = count_captions(source for findings in tables for source in findings.sources)
    return {
        "dataset_config": str(config.path),
        "decoded": decodes,
        "fps": fps,
        "pixel_step": pixel_step,
        "sources": sum(table["sources"] for table in by_table),
        "items": sum(table["items"] for table in by_table),
        "items_per_epoch": items_per_epoch,
        "batches_per_epoch": count_batches(
            findings for findings in tables if not findings.table.learning.validation
        ),
        "tables": by_table,
        "buckets": _count_buckets(tables),
        "broken": _list_with_reason(tables, "read_error"),
        **_describe_faults(tables),
        "captions": captions,
        "near_duplicates": [[str(path) for path in group] for group in copies],
        "black": _list_measured(tables, "is_black"),
        "static": _list_measured(tables, "is_static"),
        "blurred": _list_measured(tables, "is_blurred"),
        "without_items": _list_with_reason(tables, "no_item_reason"),
        **_make_distributions([inspection for findings in tables for inspection in findings.inspections]),
    }


def _describe_faults(tables: Sequence[TableFindings]) -> JsonObject:
    """Return the errors, and the warnings about files that no source uses; and how many of both there are."""
    # "faults" has no errors that are listed elsewhere: unreadable files are in "broken", missing captions in
    # "captions". The numbers include all errors and warnings, as --check counts them.
    faults, remarks = [], []
    for findings in tables:
        for error in findings.errors:
            if error.kind not in (CANNOT_BE_READ, NO_CAPTION):
                faults.append(_describe_finding(error, findings))
        for warning in findings.warnings:
            if warning.stem is None:
                remarks.append(_describe_finding(warning, findings))
    return {
        "faults": faults,
        "remarks": remarks,
        "num_faults": sum(len(findings.errors) for findings in tables),
        "num_remarks": sum(len(findings.warnings) for findings in tables),
    }


def _count_buckets(tables: Sequence[TableFindings]) -> list[JsonObject]:
    """Return the number of items of each bucket size in all tables, ascending by size."""
    sizes: Counter[tuple[int, int, int]] = Counter()
    for findings in tables:
        for bucket, count in findings.num_items_by_bucket.items():
            sizes[_complete_bucket(bucket)] += count
    return [
        {"width": width, "height": height, "frames": frames, "items": items}
        for (width, height, frames), items in sorted(sizes.items())
    ]


def _list_measured(tables: Sequence[TableFindings], flag: str) -> list[str]:
    """Return the paths of the files, without duplicates, for which a flag such as is_black is set."""
    paths = [
        str(source.path)
        for _, source, inspection in _list_inspections(tables)
        if inspection.measures is not None and getattr(inspection.measures, flag)
    ]
    return list(dict.fromkeys(paths))


def _list_inspections(tables: Sequence[TableFindings]) -> list[tuple[TableFindings, MediaSource, Inspection]]:
    """List (table, source, inspection) for all measured sources."""
    inspections = []
    for findings in tables:
        for source, inspection in zip(findings.sources, findings.inspections, strict=False):
            inspections.append((findings, source, inspection))
    return inspections


def _list_with_reason(tables: Sequence[TableFindings], name: str) -> list[JsonObject]:
    """List the media files whose inspection has a reason in the field `name`, with this reason."""
    return [
        {"path": str(source.path), "reason": getattr(inspection, name), "table": findings.table.index + 1}
        for findings, source, inspection in _list_inspections(tables)
        if getattr(inspection, name) is not None
    ]


def _describe_finding(finding: Fault, findings: TableFindings) -> JsonObject:
    """Return an error or warning about a table as JSON values."""
    return {"kind": finding.kind, "text": finding.text, "table": findings.table.index + 1}


def count_fits(findings: TableFindings) -> dict[Size, Counter[Fit]]:
    """Count, for each bucket, the combinations of resize and crop that its media files need."""
    fits: dict[Size, Counter[Fit]] = {}
    for inspection in findings.inspections:
        if inspection.items_by_length and inspection.fit is not None:
            fits.setdefault(inspection.fit.bucket, Counter())[inspection.fit] += 1
    return fits


def _count_items_per_epoch(findings: TableFindings) -> int:
    """Return how many items of a table are trained per epoch; 0 for a validation table."""
    if findings.table.learning.validation:
        return 0
    return round(findings.num_items * findings.table.learning.num_repeats * findings.balancing_factor)


def _describe_table(findings: TableFindings, total_items_per_epoch: int) -> JsonObject:
    """Return the statistics of a dataset table as JSON values."""
    # `total_items_per_epoch` is the number of items of all tables, used to compute the table's share.
    table = findings.table
    items_per_epoch = _count_items_per_epoch(findings)
    percent = 0.0
    if total_items_per_epoch:
        percent = round(100 * items_per_epoch / total_items_per_epoch, PERCENT_DIGITS)
    rows = findings.bucket_rows()
    num_references = count_references(findings.sources)
    return {
        "name": table.label,
        "kind": table.kind,
        "source": str(table.source.path),
        "sources": len(findings.sources),
        "items": findings.num_items,
        "num_repeats": table.learning.num_repeats,
        "items_per_epoch": items_per_epoch,
        "share_percent": percent,
        "batch_size": table.learning.batch_size,
        "batches_per_epoch": 0 if table.learning.validation else sum(row.batches for row in rows),
        # batches that are not full: at most the last one of each bucket
        "part_batches": sum(row.last_batch < table.learning.batch_size for row in rows),
        "resolution": list(table.buckets.resolution),
        "validation": table.learning.validation,
        "broken": sum(inspection.read_error is not None for inspection in findings.inspections),
        "without_items": sum(inspection.no_item_reason is not None for inspection in findings.inspections),
        "buckets": _summarize_buckets(findings),
        # numbers of control images or clips, and how many items have that many; empty if there are none
        "control": [{"files": number, "count": count} for number, count in num_references],
        "captions": count_captions(findings.sources),
        **_make_distributions(findings.inspections),
    }


def _summarize_buckets(findings: TableFindings) -> list[JsonObject]:
    """Return the items, batches and crop of each bucket in a table."""
    # percentage of each source that cropping to the bucket removes, by size of the bucket
    cut_percents: dict[Size, list[float]] = {}
    for size, fits in count_fits(findings).items():
        cut_percents[size] = [cut_percent(fit) for fit in fits.elements()]
    buckets = []
    for row in findings.bucket_rows():
        width, height, frames = _complete_bucket(row.bucket)
        percents = cut_percents[width, height]
        buckets.append(
            {
                "width": width,
                "height": height,
                "frames": frames,
                "items": row.items,
                "batches_per_epoch": row.batches,
                "last_batch": row.last_batch,
                "cut_percent_mean": round(statistics.fmean(percents), PERCENT_DIGITS),
                "cut_percent_max": round(max(percents), PERCENT_DIGITS),
            }
        )
    return buckets


def _complete_bucket(bucket: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the width, height and frames of a bucket; images have 1 frame."""
    frames = bucket[2] if len(bucket) > 2 else 1
    return bucket[0], bucket[1], frames


def _make_distributions(inspections: Sequence[Inspection]) -> JsonObject:
    """Return distributions of durations, frame rates, sizes and measures over all readable files."""
    durations = [inspection.seconds for inspection in inspections if inspection.seconds is not None]
    rates = Counter(round(inspection.fps, 3) for inspection in inspections if inspection.fps)
    measures = [inspection.measures for inspection in inspections if inspection.measures is not None]
    # only of clips, which have several hashes: motion is measured between frames
    motions = [measured.motion for measured in measures if len(measured.hashes) > 1]
    return {
        "durations": _make_distribution("seconds", durations),
        "rates": [{"fps": rate, "count": count} for rate, count in sorted(rates.items())],
        "resolutions": _count_resolutions(inspections),
        "brightness": _make_distribution("values", [measured.brightness for measured in measures]),
        "sharpness": _make_distribution("values", [measured.sharpness for measured in measures]),
        "motion": _make_distribution("values", motions),
        "sound": _count_audio(inspections),
    }


def _count_resolutions(inspections: Sequence[Inspection]) -> list[JsonObject]:
    """Count the media files of each resolution, the most frequent first."""
    sizes = Counter(
        inspection.size
        for inspection in inspections
        if inspection.size is not None and inspection.read_error is None
    )
    by_frequency = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    return [{"width": width, "height": height, "count": count} for (width, height), count in by_frequency]


def _count_audio(inspections: Sequence[Inspection]) -> JsonObject:
    """Return the number of clips with and without audio, and the formats of their tracks."""
    audios = [inspection.audio for inspection in inspections if inspection.audio is not None]
    tracks = [audio.track for audio in audios if audio.track is not None]
    return {
        "clips": len(tracks),
        "without": len(audios) - len(tracks),
        "remarks": sum(audio.mismatch is not None for audio in audios),  # where it does not fit the clip
        "tracks": [
            {"rate": rate, "channels": channels, "count": count}
            for rate, channels, count in count_tracks(tracks)
        ],
    }


def _make_distribution(name: str, values: Sequence[float]) -> JsonObject:
    """Return the summary statistics and the histogram of `values`."""
    return {name: summarize(values), "histogram": count_bins(values)}


def summarize(values: Sequence[float]) -> JsonObject | None:
    """Return count, min, median, mean, max and total of numbers; None for an empty list."""
    if not len(values):
        return None
    array = np.asarray(values, np.float64)
    return {
        "count": _plain(len(array)),
        "min": _plain(np.min(array)),
        "median": _plain(float(np.median(array))),
        "mean": _plain(float(np.mean(array))),
        "max": _plain(np.max(array)),
        "total": _plain(array.sum()),
    }


def count_bins(values: Sequence[float]) -> list[JsonObject]:
    """Return the histogram of values as a list of bins: `from` (inclusive), `to` (exclusive), `count`.

    All bins have the same width (1, 2 or 5 times a power of ten), and there are at most about 16. The last
    bin includes its `to`, and any outliers.
    """
    if not len(values):
        return []
    array = np.asarray(values, np.float64)
    low = float(array.min())
    high = float(array.max())
    percentile_98 = float(np.quantile(array, 0.98))
    # if the largest 2 % would take more than half of the range, they are outliers and share the last bin
    has_outliers = high > 2 * percentile_98 - low
    end = percentile_98 if has_outliers else high
    are_integers = bool((array == np.floor(array)).all())
    width = _select_bin_width((end - low) / MAX_BINS, are_integers)
    # equally wide bins from `low` to `end`, of which the last extends to `high`
    first_edge = math.floor(low / width) * width
    num_bins = math.floor((end - first_edge) / width + 1e-9) + 1
    if high >= first_edge + num_bins * width:
        num_bins += 1  # one more bin, for the outliers between `end` and `high`
    edges = [first_edge + index * width for index in range(num_bins)]
    edges.append(max(high, first_edge + num_bins * width))
    # a little is added, so that rounding moves no value into an earlier bin
    raised = np.minimum(array + 1e-9 * width, edges[-1])
    counts, _ = np.histogram(raised, edges)
    bins = []
    for start, stop, count in zip(edges, edges[1:], counts, strict=False):
        bins.append({"from": _plain(start), "to": _plain(stop), "count": int(count)})
    return bins


def _select_bin_width(minimum: float, are_integers: bool) -> float:
    """Return the smallest of 1, 2 or 5 times a power of ten that is at least `minimum`; for integers >= 1."""
    if minimum <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(minimum))
    factor = next(factor for factor in (1, 2, 5, 10) if factor * power >= minimum * (1 - 1e-9))
    width = factor * power
    return max(1.0, width) if are_integers else width


def _plain(value: float) -> float | int:
    """Round a number for JSON, and drop a trailing ".0"."""
    number = round(float(value), DIGITS)
    return int(number) if number == int(number) else number


def count_captions(sources: Iterable[MediaSource]) -> JsonObject:
    """Return statistics of captions as training uses them: lengths, words and repeated texts."""
    captions = _CaptionCounts()
    for source in sources:
        captions.add(source)
    num_without = {reason: len(paths) for reason, paths in captions.paths_without.items()}
    paths_by_repeated_text = {}
    for text, paths in captions.paths_of_text.items():
        if len(paths) > 1:
            paths_by_repeated_text[text] = list(paths.values())
    # captions that several files share, the most frequent first
    by_frequency = sorted(paths_by_repeated_text.items(), key=lambda item: (-len(item[1]), item[1][0]))
    return {
        "total": len(captions.num_words) + num_without["empty"],  # `num_words` has only the other captions
        **num_without,
        "duplicates": sum(len(paths) - 1 for paths in paths_by_repeated_text.values()),
        "words": summarize(captions.num_words),
        "characters": summarize(captions.num_characters),
        "words_histogram": count_bins(captions.num_words),
        "distinct_words": len(captions.words),
        "frequent_words": captions.list_frequent_words(),
        "trigger_words": [
            {"word": word, "captions": count, "present": captions.num_captions_with_trigger[word]}
            for word, count in sorted(captions.num_captions_of_trigger.items())
        ],
        "duplicate_texts": [
            {"text": shorten(text, SHOWN_TEXT), "count": len(paths), "paths": paths[:MAX_PATHS]}
            for text, paths in by_frequency[:MAX_DUPLICATES]
        ],
        **{f"{reason}_paths": paths for reason, paths in captions.paths_without.items()},
    }


class _CaptionCounts:
    """Statistics about captions, updated for each media file."""

    def __init__(self) -> None:
        self.words: Counter[str] = Counter()
        self.num_captions_with: Counter[str] = Counter()  # in how many captions a word occurs
        self.num_words: list[int] = []  # of each caption that is not empty
        self.num_characters: list[int] = []
        # caption -> absolute path -> path as the dataset names it
        self.paths_of_text: defaultdict[str, dict[Path, str]] = defaultdict(dict)
        # paths of files without a usable caption, by reason
        self.paths_without: dict[str, list[str]] = {"empty": [], "missing": [], "unreadable": []}
        # trigger word -> number of captions in tables with this word, and of those that contain it
        self.num_captions_of_trigger: Counter[str] = Counter()
        self.num_captions_with_trigger: Counter[str] = Counter()

    def add(self, source: MediaSource) -> None:
        """Add all captions of a source to the counts; note the source if it has no usable caption."""
        path = str(source.path)
        if source.caption is None:
            reason = "unreadable" if has_unreadable_caption(source) else "missing"
            self.paths_without[reason].append(path)
            return
        for caption in (source.caption, *source.more_captions):
            trigger = source.table.captions.trigger_word
            if trigger:
                self.num_captions_of_trigger[trigger] += 1
                is_present = re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption) is not None
                self.num_captions_with_trigger[trigger] += is_present
            if not caption.strip():
                self.paths_without["empty"].append(path)
                continue
            lower_words = [word.lower() for word in _WORD.findall(caption)]
            self.words.update(lower_words)
            self.num_captions_with.update(set(lower_words))
            self.num_words.append(len(lower_words))
            self.num_characters.append(len(caption))
            # a file that is reached by two paths counts once
            self.paths_of_text[caption].setdefault(Path(path).absolute(), path)

    def list_frequent_words(self) -> list[JsonObject]:
        """List the words that the largest numbers of captions contain, without stop words."""
        words = [word for word in self.words if word not in STOP_WORDS]
        words.sort(key=lambda word: (-self.num_captions_with[word], -self.words[word], word))
        return [
            {"word": word, "count": self.words[word], "captions": self.num_captions_with[word]}
            for word in words[:MAX_WORDS]
        ]
