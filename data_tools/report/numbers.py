"""Collect all numbers of the report as one JSON object, which the page shows too."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.report.findings import NO_CAPTION, TableFindings, count_batches, count_references, is_unread
from data_tools.report.looks import Look, cut_percent
from data_tools.report.sound import count_tracks
from dataset.config import DatasetConfig
from dataset.sources.media_source import Fault, MediaSource
from modules.control_codes import shorten
from modules.media.buckets import Fit, Size

CANNOT_BE_READ = "cannot be read"
MOST_BINS = 16
DIGITS, PERCENT_DIGITS = 6, 2
MOST_WORDS = 60  # of the most frequent ones
MOST_DUPLICATES = 200  # texts that are listed
MOST_PATHS = 20  # of a text
SHOWN_TEXT = 300  # characters of a text that occurs more than once
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")

# English words that say nothing about a picture; other languages are counted whole
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
Numbers = dict[str, Any]


def collect_numbers(
    config: DatasetConfig,
    tables: Sequence[TableFindings],
    copies: Sequence[Sequence[Path]],
    fps: float,
    pixel_step: int,
    decodes: bool,
) -> Numbers:
    """Return the report as JSON values.

    tables: measured. copies: groups of near duplicates. decodes: False if only headers were
    read.
    """
    epoch = sum(map(_items_per_epoch, tables))
    each = [_count_table(found, epoch) for found in tables]
    sizes: Counter[tuple[int, int, int]] = Counter()
    for found in tables:
        for key, count in found.buckets.items():
            sizes[_whole_key(key)] += count
    measured = [
        (str(source.path), look.measures) for _, source, look in _looked(tables) if look.measures is not None
    ]
    return {
        "dataset_config": str(config.path),
        "decoded": decodes,
        "fps": fps,
        "pixel_step": pixel_step,
        "sources": sum(table["sources"] for table in each),
        "items": sum(table["items"] for table in each),
        "items_per_epoch": epoch,
        "batches_per_epoch": count_batches(found for found in tables if not found.table.validation),
        "tables": each,
        "buckets": [
            {"width": width, "height": height, "frames": frames, "items": items}
            for (width, height, frames), items in sorted(sizes.items())
        ],
        "broken": _with_reason(tables, "problem"),
        # faults of files and captions have their own lists
        "faults": _told(tables, "faults", lambda fault: fault.kind not in (CANNOT_BE_READ, NO_CAPTION)),
        # about files that no source uses
        "remarks": _told(tables, "remarks", lambda fault: fault.stem is None),
        # all of them, as --check counts them
        "num_faults": sum(len(found.faults) for found in tables),
        "num_remarks": sum(len(found.remarks) for found in tables),
        "captions": (
            each[0]["captions"]
            if len(each) == 1
            else count_captions(source for found in tables for source in found.sources)
        ),
        "near_duplicates": [[str(path) for path in group] for group in copies],
        **{
            name: list(dict.fromkeys(path for path, one in measured if getattr(one, f"is_{name}")))
            for name in ("black", "static", "blurred")
        },
        "without_items": _with_reason(tables, "none"),
        **_distributions([look for found in tables for look in found.looks]),
    }


def _looked(tables: Sequence[TableFindings]) -> list[tuple[TableFindings, MediaSource, Look]]:
    return [(found, *pair) for found in tables for pair in zip(found.sources, found.looks, strict=False)]


def _with_reason(tables: Sequence[TableFindings], name: str) -> list[Numbers]:
    return [
        {"path": str(source.path), "reason": getattr(look, name), "table": found.table.index + 1}
        for found, source, look in _looked(tables)
        if getattr(look, name) is not None
    ]


def _told(tables: Sequence[TableFindings], name: str, is_listed: Callable[[Fault], bool]) -> list[Numbers]:
    return [
        {"kind": fault.kind, "text": fault.text, "table": found.table.index + 1}
        for found in tables
        for fault in getattr(found, name)
        if is_listed(fault)
    ]


def count_fits(found: TableFindings) -> dict[Size, Counter[Fit]]:
    """Count for each bucket how the sources that give items are resized and cropped to it."""
    fits: dict[Size, Counter[Fit]] = {}
    for look in found.looks:
        if look.lengths and look.fit is not None:
            fits.setdefault(look.fit.bucket, Counter())[look.fit] += 1
    return fits


def _items_per_epoch(found: TableFindings) -> int:
    return 0 if found.table.validation else round(found.num_items * found.table.num_repeats * found.times)


def _count_table(found: TableFindings, epoch: int) -> Numbers:
    table, own, rows = found.table, _items_per_epoch(found), found.bucket_rows()
    cuts = {bucket: list(map(cut_percent, fits.elements())) for bucket, fits in count_fits(found).items()}
    return {
        "name": table.place,
        "kind": table.kind,
        "source": str(table.source),
        "sources": len(found.sources),
        "items": found.num_items,
        "num_repeats": table.num_repeats,
        "items_per_epoch": own,
        "share_percent": round(100 * own / epoch, PERCENT_DIGITS) if epoch else 0.0,
        "batch_size": table.batch_size,
        "batches_per_epoch": 0 if table.validation else sum(batches for _, _, batches, _ in rows),
        "part_batches": sum(last < table.batch_size for *_, last in rows),
        "resolution": list(table.resolution),
        "validation": table.validation,
        "broken": sum(look.problem is not None for look in found.looks),
        "without_items": sum(look.none is not None for look in found.looks),
        "buckets": [
            {
                **dict(zip(("width", "height", "frames"), _whole_key(key), strict=True)),
                "items": items,
                "batches_per_epoch": batches,
                "last_batch": last,
                "cut_percent_mean": round(statistics.fmean(cuts[key[0], key[1]]), PERCENT_DIGITS),
                "cut_percent_max": round(max(cuts[key[0], key[1]]), PERCENT_DIGITS),
            }
            for key, items, batches, last in rows
        ],
        # numbers of control images or clips, and how many items have so many; empty if there are none
        "control": [{"files": number, "count": count} for number, count in count_references(found.sources)],
        "captions": count_captions(found.sources),
        **_distributions(found.looks),
    }


def _whole_key(key: tuple[int, ...]) -> tuple[int, int, int]:
    return key[0], key[1], key[2] if len(key) > 2 else 1


def _distributions(looks: Sequence[Look]) -> Numbers:
    """Return durations, rates, sizes and measures of sources that can be read."""
    rates = Counter(round(look.fps, 3) for look in looks if look.fps)
    sizes = Counter(look.size for look in looks if look.size is not None and look.problem is None)
    measures = [look.measures for look in looks if look.measures is not None]
    moving = [one.motion for one in measures if len(one.hashes) > 1]
    heard = [look.heard for look in looks if look.heard is not None]
    tracks = [one.track for one in heard if one.track is not None]
    return {
        "durations": _distribution("seconds", [look.seconds for look in looks if look.seconds is not None]),
        "rates": [{"fps": rate, "count": count} for rate, count in sorted(rates.items())],
        "resolutions": [
            {"width": width, "height": height, "count": count}
            for (width, height), count in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
        ],
        "brightness": _distribution("values", [one.brightness for one in measures]),
        "sharpness": _distribution("values", [one.sharpness for one in measures]),
        "motion": _distribution("values", moving),
        "sound": {
            "clips": len(tracks),
            "without": len(heard) - len(tracks),
            "remarks": sum(one.remark is not None for one in heard),  # where it does not fit the clip
            "tracks": [
                {"rate": rate, "channels": channels, "count": count}
                for rate, channels, count in count_tracks(tracks)
            ],
        },
    }


def _distribution(name: str, values: Sequence[float]) -> Numbers:
    return {name: summarise(values), "histogram": count_bins(values)}


def summarise(values: Sequence[float]) -> Numbers | None:
    """Return count, min, median, mean, max and total of numbers; None if there are none."""
    if not len(values):
        return None
    numbers = np.asarray(values, np.float64)
    found = {name: getattr(np, name)(numbers) for name in ("min", "median", "mean", "max")}
    found = {"count": len(numbers), **found, "total": numbers.sum()}
    return {name: _plain(value) for name, value in found.items()}


def count_bins(values: Sequence[float]) -> list[Numbers]:
    """Return a histogram: `from` (included), `to` (not included but in the last bin) and `count` of each bin.

    All bins have one width (1, 2 or 5 times a power of ten), and there are at most about 16. A few far larger
    values share the last bin, so that they do not squeeze the others into one.
    """
    if not len(values):
        return []
    numbers = np.asarray(values, np.float64)
    low, high = float(numbers.min()), float(numbers.max())
    usual = float(np.quantile(numbers, 0.98))
    end = high if high <= 2 * usual - low else usual
    least, width = (end - low) / MOST_BINS, 1.0
    if least > 0:
        power = 10.0 ** math.floor(math.log10(least))
        width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
        width = max(1.0, width) if (numbers == np.floor(numbers)).all() else width
    start = math.floor(low / width) * width
    count = math.floor((end - start) / width + 1e-9) + 1
    count += high >= start + count * width  # the last bin takes what is far larger
    edges = [*(start + index * width for index in range(count)), max(high, start + count * width)]
    # a little is added, so that rounding moves no value into an earlier bin
    sums, _ = np.histogram(np.minimum(numbers + 1e-9 * width, edges[-1]), edges)
    return [
        {"from": _plain(edge), "to": _plain(top), "count": int(number)}
        for edge, top, number in zip(edges, edges[1:], sums, strict=False)
    ]


def _plain(value: float) -> float | int:
    number = round(float(value), DIGITS)
    return int(number) if number == int(number) else number


def count_captions(sources: Iterable[MediaSource]) -> Numbers:
    """Return statistics of captions, including prefixes and the like: lengths, words, repeated texts."""
    words: Counter[str] = Counter()
    holders: Counter[str] = Counter()  # in how many captions a word occurs
    counts: list[tuple[int, int]] = []  # words and characters of each caption that is not empty
    paths: dict[str, dict[Path, str]] = {}  # text -> paths by absolute path: each file once
    without: dict[str, list[str]] = {"empty": [], "missing": [], "unreadable": []}
    triggers: Counter[str] = Counter()  # captions of tables with that trigger word
    present: Counter[str] = Counter()  # those that hold the trigger word
    for source in sources:
        path, trigger = str(source.path), source.table.trigger_word
        if source.caption is None:
            without["unreadable" if is_unread(source) else "missing"].append(path)
            continue
        for caption in (source.caption, *source.more_captions):
            if trigger:
                triggers[trigger] += 1
                present[trigger] += bool(re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption))
            if not caption.strip():
                without["empty"].append(path)
                continue
            found = [word.lower() for word in _WORD.findall(caption)]
            words.update(found)
            holders.update(set(found))
            counts.append((len(found), len(caption)))
            paths.setdefault(caption, {}).setdefault(Path(path).absolute(), path)
    repeated = {text: list(places.values()) for text, places in paths.items() if len(places) > 1}
    ranked = sorted(repeated.items(), key=lambda item: (-len(item[1]), item[1][0]))
    telling = [(word, count) for word, count in words.items() if word not in STOP_WORDS]
    frequent = sorted(telling, key=lambda item: (-holders[item[0]], -item[1], item[0]))[:MOST_WORDS]
    lengths = [count for count, _ in counts]
    return {
        "total": len(counts) + len(without["empty"]),
        **{name: len(places) for name, places in without.items()},
        "duplicates": sum(len(places) - 1 for places in repeated.values()),
        "words": summarise(lengths),
        "characters": summarise([count for _, count in counts]),
        "words_histogram": count_bins(lengths),
        "distinct_words": len(words),
        "frequent_words": [
            {"word": word, "count": count, "captions": holders[word]} for word, count in frequent
        ],
        "trigger_words": [
            {"word": word, "captions": count, "present": present[word]}
            for word, count in sorted(triggers.items())
        ],
        "duplicate_texts": [
            {"text": shorten(text, SHOWN_TEXT), "count": len(places), "paths": places[:MOST_PATHS]}
            for text, places in ranked[:MOST_DUPLICATES]
        ],
        **{f"{name}_paths": places for name, places in without.items()},
    }
