"""Write the page of --check: totals, faults, the buckets, and a card for each file."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.caching.prefetch import read_ahead
from dataset.caching.reports import Failure
from dataset.checking.captions import Counters
from dataset.checking.findings import CheckResult, TableFindings
from dataset.checking.looks import MediaLook, look_at
from dataset.config import DatasetConfig, DatasetTable
from dataset.sources.faults import Fault
from dataset.sources.media_source import MediaSource
from modules.bars import Bar
from modules.console import count_of
from modules.contract.data import LatentSpec
from modules.contract.rules import TokenCount
from modules.control_codes import escape_control_codes
from modules.pages.page import write_page

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).resolve().parent / "check.html"
MOST_CHARACTERS = 6000  # of a caption
MOST_LOST = 1000  # of what no encoder reads
MOST_LINES = 200  # of one kind of fault
MOST_SPANS = 120  # of one length in the drawing of a clip

# "fault" or "remark", table and stem -> what was found
Told = dict[tuple[str, int, str], list[Fault]]


@dataclass(frozen=True)
class CaptionPart:
    """A part of a caption, and who does not read it."""

    text: str
    unread_by: tuple[str, ...]
    is_lost: bool  # no encoder reads it


@dataclass(frozen=True)
class CheckCard:
    """One file as the page shows it."""

    name: str
    source: MediaSource
    look: MediaLook
    faults: Sequence[Fault]
    remarks: Sequence[Fault]
    counts: Sequence[tuple[str, TokenCount]]
    texts: Sequence[Sequence[CaptionPart]]  # the caption as each group of encoders reads it
    windows: Sequence[tuple[int, Sequence[tuple[float, float]], int]]  # length, (start, width) in %, how many


@dataclass(frozen=True)
class TableSection:
    """A table with its cards."""

    found: TableFindings
    place: str
    settings: str
    caches: Sequence[str]
    faults: Sequence[Fault]
    remarks: Sequence[Fault]
    cards: Sequence[CheckCard]


def write_check_page(
    path: Path,
    config: DatasetConfig,
    result: CheckResult,
    counters: Counters,
    latent: LatentSpec,
    fps: float,
    most: int,
    workers: int,
) -> None:
    """Write the page: at most `most` files, each read once, in `workers` threads.

    Raises OutputError if the page cannot be written.
    """
    chosen = choose_sources(result.tables, most)
    pairs = [
        (found, source) for found, sources in zip(result.tables, chosen, strict=True) for source in sources
    ]
    cards: dict[int, list[CheckCard]] = {found.table.index: [] for found in result.tables}
    bar = Bar(len(pairs), "Reading pictures", "file")

    told = told_by_source(result.tables)

    def work(pair: tuple[TableFindings, MediaSource]) -> CheckCard:
        return _make_card(pair[1], look_at(pair[1], fps, latent), counters, told)

    for (found, _), card in read_ahead(pairs, lambda pair: pair[1], work, workers, bar):
        assert not isinstance(card, Failure)  # what cannot be read is told on the card
        cards[found.table.index].append(card)
    sections = [_make_section(found, cards[found.table.index]) for found in result.tables]
    files = sum(len(found.sources) for found in result.tables)
    values = {
        "sections": sections,
        "result": result,
        "missing": list(map(escape_control_codes, counters.missing)),
        "fps": fps,
        "shown": len(pairs),
        "files": files,
        "tail": list(map(escape_control_codes, result.tail)),
        "most_lines": MOST_LINES,
    }
    write_page(path, TEMPLATE, f"{config.path.name}: {count_of(files, 'file')} checked", values)
    logger.info("wrote %s", path)


def choose_sources(tables: Sequence[TableFindings], most: int) -> list[list[MediaSource]]:
    """Choose at most `most` sources: those with faults, those with remarks, then evenly from the others.

    Returns the sources of each table in this order.
    """
    ranked: list[list[tuple[int, int]]] = [[], [], []]  # table and place of: faults, remarks, all others
    for index, found in enumerate(tables):
        wrong, remarked = ({one.stem for one in ones} for ones in (found.faults, found.remarks))
        for place, source in enumerate(found.sources):
            rank = 0 if source.stem in wrong else 1 if source.stem in remarked else 2
            ranked[rank].append((index, place))
    chosen: list[list[MediaSource]] = [[] for _ in tables]
    left = most
    for places in ranked:
        for index, place in _spread(places, left):
            chosen[index].append(tables[index].sources[place])
        left = max(0, left - len(places))
    return chosen


def _spread(places: Sequence[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """Return at most `most` of the places, evenly chosen."""
    if len(places) <= most:
        return list(places)
    return [places[int(index)] for index in np.linspace(0, len(places) - 1, most).round()] if most else []


def _make_section(found: TableFindings, cards: Sequence[CheckCard]) -> TableSection:
    place, caches = (
        escape_control_codes(str(found.table.source)),
        list(map(escape_control_codes, found.caches)),
    )
    faults, remarks = _escape(found.faults), _escape(found.remarks)
    return TableSection(found, place, _describe(found.table), caches, faults, remarks, cards)


def _make_card(source: MediaSource, look: MediaLook, counters: Counters, told: Told) -> CheckCard:
    index = source.table.index
    faults, remarks = (told.get((which, index, source.stem), []) for which in ("fault", "remark"))
    counts = counters.count(source.caption) if source.caption else []
    name = escape_control_codes(source.path.name)
    texts = [] if source.caption is None else caption_segments(source.caption, counts)
    for caption in source.more_captions:
        texts += caption_segments(caption, counters.count(caption))
    return CheckCard(name, source, look, faults, remarks, counts, texts, _windows(look))


def told_by_source(tables: Sequence[TableFindings]) -> Told:
    """Return the faults and remarks of each source, with control codes written out."""
    told: Told = {}
    for found in tables:
        for which, ones in (("fault", found.faults), ("remark", found.remarks)):
            for one in _escape(ones):
                if one.stem is not None:
                    told.setdefault((which, found.table.index, one.stem), []).append(one)
    return told


def _escape(faults: Sequence[Fault]) -> list[Fault]:
    """Write control codes out: they would hide or reorder the text."""
    return [Fault(one.kind, escape_control_codes(one.text), one.stem) for one in faults]


def caption_segments(caption: str, counts: Sequence[tuple[str, TokenCount]]) -> list[list[CaptionPart]]:
    """Split a caption where encoders stop reading. Encoders that read the same text share one entry."""
    if not counts:
        return [[CaptionPart(shorten_caption(caption), (), False)]]
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
            shown = shorten_caption(text[start:end], MOST_LOST if is_lost else MOST_CHARACTERS)
            segments.append(CaptionPart(shown, unread, is_lost))
        found.append(segments)
    return found


def shorten_caption(text: str, most: int = MOST_CHARACTERS) -> str:
    """Return the beginning of a text, with control codes written out, and how much is left out."""
    more = f" [... and {len(text) - most:,} more characters]" if len(text) > most else ""
    return escape_control_codes(text[:most]) + more


def _windows(look: MediaLook) -> list[tuple[int, list[tuple[float, float]], int]]:
    """Return the spans of each length, as parts of the frames that are used, in percent."""
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
        targets = ", ".join(map(str, table.target_frames))
        parts.append(
            table.frame_extraction
            if table.frame_extraction == "full"
            else f"{table.frame_extraction}: {targets} frames"
        )
        parts += [f"source_fps {table.source_fps}"] if table.source_fps is not None else []
    parts += ["for validation"] if table.validation else []
    return "; ".join(parts)
