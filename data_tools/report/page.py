"""Write the page of --check or of the report: one HTML file that fetches nothing and runs no script."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.report.findings import NO_COUNTERS, CheckResult, Counters, TableFindings, references_in_words
from data_tools.report.looks import Look, ShownReference, StripSize, show, show_references
from data_tools.report.numbers import Numbers, count_fits
from data_tools.report.options import ReportOptions
from dataset.caching.prefetch import Failure, read_ahead
from dataset.config import DatasetConfig, DatasetTable
from dataset.sources.media_source import MediaSource
from modules.bars import Bar
from modules.console import count_of, count_words, in_words
from modules.contract.data import LatentSpec
from modules.contract.rules import TokenCount
from modules.media.buckets import Size
from modules.pages.page import write_page

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).resolve().parent / "report.html"
CHECK_STRIP = StripSize(clip_height=104, picture_height=240, width=1180, quality=80)
REPORT_STRIP = StripSize(clip_height=120, picture_height=260, width=660, quality=78)
MOST_CHARACTERS = 20_000  # of a caption
MOST_LOST = 1000  # of what no encoder reads
MOST_SPANS = 120  # of one length in the drawing of a clip
MOST_BUCKETS = 60  # sizes of a table
MOST_OUTLINES = 40  # different sizes that are drawn in a bucket
MARGIN = 3  # percent of the drawing
# lines of a list, rows of sizes and rates, groups of near copies, files in one
MOST = {"most_lines": 200, "most_rows": 7, "most_groups": 60, "most_in_group": 12}
FILTERS = (
    ("faulty", "with faults"),
    ("told", "with remarks"),
    ("copy", "near-duplicates"),
    ("black", "black"),
    ("static", "static"),
    ("blurred", "blurred"),
    ("cut", "a fifth or more cut off"),
)
# (part of a caption, the encoders that do not read it, whether no encoder reads it)
CaptionPart = tuple[str, tuple[str, ...], bool]


@dataclass(frozen=True)
class Card:
    """One file as the page shows it."""

    place: str  # names the card in links
    source: MediaSource
    look: Look
    faults: Sequence[str]
    remarks: Sequence[str]
    counts: Sequence[tuple[str, TokenCount]]
    texts: Sequence[Sequence[CaptionPart]]  # the captions as each group of encoders reads them
    windows: Sequence[tuple[int, Sequence[tuple[float, float]], int]]  # of `_windows`
    marks: Sequence[str]  # classes by which the page filters
    references: Sequence[ShownReference]  # of an image; empty for clips


def write_check_page(
    path: Path,
    config: DatasetConfig,
    result: CheckResult,
    latent: LatentSpec,
    fps: float,
    most: int,
    workers: int,
    hears: bool = False,
) -> None:
    """Write the page of a check: at most `most` files, each read once, in `workers` threads.

    hears: the model learns sound. Raises OutputError if the page cannot be written.
    """
    cards = _make_cards(result.tables, result.counters, latent, fps, most, workers, CHECK_STRIP, hears=hears)
    files = sum(len(found.sources) for found in result.tables)
    values = {
        "result": result,
        "sections": [
            (found, _describe(found.table), [card for card in cards if card.source.table is found.table])
            for found in result.tables
        ],
        "files": files,
    }
    title = f"{config.path.name}: {count_of(files, 'file')} checked"
    _write_page(path, title, values, cards, fps)


def write_report_page(
    path: Path,
    config: DatasetConfig,
    tables: Sequence[TableFindings],
    numbers: Numbers,
    options: ReportOptions,
    latent: LatentSpec,
    workers: int,
) -> None:
    """Write the page of the report. numbers: the result of `collect_numbers`; the page shows nothing else.

    Raises OutputError if the page cannot be written.
    """
    copies = {path for group in numbers["near_duplicates"] for path in group}
    cards = _make_cards(
        tables, NO_COUNTERS, latent, options.fps, options.items, workers, REPORT_STRIP, copies, hears=True
    )
    values = {
        "result": None,
        "report": numbers,
        "sections": [
            (table, *_draw_table(table, found), [card for card in cards if card.source.table is found.table])
            for table, found in zip(numbers["tables"], tables, strict=True)
        ],
        "links": {str(card.source.path): card for card in cards},
        "number": _number,
        "in_words": in_words,
    }
    _write_page(path, config.path.name, values, cards, options.fps)


def name_source(source: Path | str) -> str:
    """Return the name of a table's folder or list for a heading; the working folder by its own name."""
    return str(source) if Path(source).name else Path.cwd().name or str(source)


def _write_page(path: Path, title: str, values: Mapping[str, Any], cards: Sequence[Card], fps: float) -> None:
    filters = [(mark, words, sum(mark in card.marks for card in cards)) for mark, words in FILTERS]
    shared: dict[str, Any] = {
        "fps": fps,
        "cards": len(cards),
        "filters": [one for one in filters if one[2]],
        **MOST,
    }
    shared["name_of"] = lambda path: Path(path).name
    shared["source_name"] = name_source
    shared |= {"references_in_words": references_in_words, "count_words": count_words}
    write_page(path, TEMPLATE, title, {**shared, **values})
    logger.info("wrote %s", path)


# --- cards
# ------------------------------------------------------------------------------------------------------------


def _make_cards(
    tables: Sequence[TableFindings],
    counters: Counters,
    latent: LatentSpec,
    fps: float,
    most: int,
    workers: int,
    shown: StripSize,
    copies: frozenset[str] | set[str] = frozenset(),
    hears: bool = False,
) -> list[Card]:
    """Read at most `most` files again and return their cards, in the order of their tables.

    hears: draw the sound of clips.
    """
    chosen = choose_sources(tables, most)
    pairs = [(found, place) for found, places in zip(tables, chosen, strict=True) for place in places]
    told = {
        found.table.index: (found.texts_by_stem("faults"), found.texts_by_stem("remarks")) for found in tables
    }

    def work(pair: tuple[TableFindings, int]) -> Card:
        found, place = pair
        source = found.sources[place]
        look = show(source, fps, latent, shown, hears)
        paths = {str(path) for path in (source.path, source.caption_path)}
        faults, remarks = (
            # empty captions are reported by path only: the card shows them
            [text for text in texts.get(source.stem, []) if text not in paths]
            for texts in told[found.table.index]
        )
        if look.problem is not None and not faults:
            faults = [look.problem]
        measures = found.looks[place].measures if found.looks else None
        captions = [] if source.caption is None else [source.caption, *source.more_captions]
        counts = [counters.count(caption) if caption else [] for caption in captions]
        told_of = {"faulty": bool(faults), "told": bool(remarks)}
        seen = {name: bool(getattr(measures, f"is_{name}", False)) for name in ("black", "static", "blurred")}
        flags = {**told_of, **seen, "copy": str(source.path) in copies, "cut": look.cut_percent > 20}
        return Card(
            f"file-{found.table.index + 1}-{place}",
            source,
            replace(look, measures=measures),
            faults,
            remarks,
            counts[0] if counts else [],
            [text for one in zip(captions, counts, strict=True) for text in caption_segments(*one)],
            _windows(look),
            [mark for mark, is_set in flags.items() if is_set],
            show_references(source, look.fit, shown),
        )

    cards = []
    bar = Bar(len(pairs), "Reading pictures", "file")
    for _, card in read_ahead(pairs, lambda pair: pair[0].sources[pair[1]], work, workers, bar):
        assert not isinstance(card, Failure)  # the card shows what cannot be read
        cards.append(card)
    return cards


def choose_sources(tables: Sequence[TableFindings], most: int) -> list[list[int]]:
    """Choose at most `most` sources: first with faults, then with remarks, then others, each evenly spaced.

    Returns for each table the indices of its sources in this order.
    """
    ranked: list[list[tuple[int, int]]] = [[], [], []]  # table and place of: faults, remarks, all others
    for index, found in enumerate(tables):
        wrong, remarked = ({one.stem for one in ones} for ones in (found.faults, found.remarks))
        for place, source in enumerate(found.sources):
            ranked[0 if source.stem in wrong else 1 if source.stem in remarked else 2].append((index, place))
    chosen: list[list[int]] = [[] for _ in tables]
    left = most
    for places in ranked:
        count = min(left, len(places))
        evenly = np.linspace(0, len(places) - 1, count).round().astype(int) if count else ()
        for index, place in (places[one] for one in evenly):
            chosen[index].append(place)
        left -= count
    return chosen


def caption_segments(caption: str, counts: Sequence[tuple[str, TokenCount]]) -> list[list[CaptionPart]]:
    """Split a caption where encoders stop reading; encoders that read the same text share an entry."""
    if not counts:
        return [[(_shorten(caption, MOST_CHARACTERS), (), False)]]
    by_text: dict[str, list[tuple[str, TokenCount]]] = {}
    for name, count in counts:
        by_text.setdefault(count.text, []).append((name, count))
    found = []
    for text, readers in by_text.items():
        places = sorted({0, len(text), *(count.kept for _, count in readers)})
        segments = []
        for start, end in zip(places, places[1:], strict=False):
            unread = tuple(name for name, count in readers if count.kept <= start)
            is_lost = len(unread) == len(readers)
            text_shown = _shorten(text[start:end], MOST_LOST if is_lost else MOST_CHARACTERS)
            segments.append((text_shown, unread, is_lost))
        found.append(segments)
    return found


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} [... and {len(text) - most:,} more characters]"


def _windows(look: Look) -> list[tuple[int, list[tuple[float, float]], int]]:
    """Return (length, [(start, width)], count) of the spans, in percent of the used frames."""
    by_length: dict[int, list[tuple[float, float]]] = {}
    for start, length in look.spans:
        place = (100 * start / max(look.used, 1), 100 * length / max(look.used, 1))
        by_length.setdefault(length, []).append(place)
    return [(length, places[:MOST_SPANS], len(places)) for length, places in sorted(by_length.items())]


def _describe(table: DatasetTable) -> str:
    width, height = table.resolution
    buckets = "one size" if not table.enable_bucket else "buckets"
    parts = [f"{width}x{height}, {buckets}", f"batch_size {table.batch_size}"]
    parts += [f"num_repeats {table.num_repeats}"] if table.num_repeats != 1 else []
    if table.kind == "video":
        targets = f": {', '.join(map(str, table.target_frames))} frames"
        parts.append(table.frame_extraction + ("" if table.frame_extraction == "full" else targets))
        parts += [f"source_fps {table.source_fps}"] if table.source_fps is not None else []
    return "; ".join([*parts, *(["for validation"] if table.validation else [])])


# --- drawings
# ------------------------------------------------------------------------------------------------------------


def _draw_table(table: Numbers, found: TableFindings) -> tuple[list[Numbers], int]:
    """Draw what the largest buckets cut off; returns the drawings, and the number of sizes not drawn.

    A drawing shows the most frequent outlines of sources around the part that the bucket keeps.
    """
    by_size: dict[Size, list[Numbers]] = {}
    for bucket in table["buckets"]:
        by_size.setdefault((bucket["width"], bucket["height"]), []).append(bucket)
    most = set(sorted(by_size, key=lambda size: -sum(row["items"] for row in by_size[size]))[:MOST_BUCKETS])
    fits_of, drawings = count_fits(found), []
    for size in (one for one in by_size if one in most):
        fits = fits_of[size]
        frequent = fits.most_common(MOST_OUTLINES)
        # edges of the whole source relative to the bucket's corner
        boxes = [(-fit.crop[0], -fit.crop[1], *fit.resized, count) for fit, count in frequent]
        left, top = min(x for x, *_ in boxes), min(y for _, y, *_ in boxes)
        width = max(x + w for x, _, w, *_ in boxes) - left
        height = max(y + h for _, y, _, h, _ in boxes) - top
        pad = MARGIN * max(width, height) / 100
        text = f"{fits.total():,} files, outlines of {len(fits):,} sizes around what is kept"
        drawings.append(
            {
                "rows": by_size[size],  # the buckets of this size
                "view": f"{left - pad:g} {top - pad:g} {width + 2 * pad:g} {height + 2 * pad:g}",
                "text": f"{size[0]} x {size[1]}: {text}",
                "boxes": boxes,  # x, y, width and height of an outline, number of files
            }
        )
    return drawings, len(by_size) - len(drawings)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
