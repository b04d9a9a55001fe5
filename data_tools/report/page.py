"""Write the page of --check or of the report: one HTML file that loads nothing and runs no script."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.report.findings import (
    NO_TOKEN_COUNTERS,
    CheckResult,
    TableFindings,
    TokenCounters,
    group_by_stem,
    references_in_words,
)
from data_tools.report.looks import (
    Inspection,
    Measures,
    ShownReference,
    ThumbnailSizes,
    inspect_and_draw,
    select_evenly,
    show_references,
)
from data_tools.report.numbers import JsonObject, count_fits
from dataset.caching.prefetch import Failure, read_ahead
from dataset.config import DatasetConfig, DatasetTable
from dataset.options import DATASET_FILE
from dataset.sources.media_source import MediaSource
from dataset.timestep_keys import TIMESTEP_KEYS
from modules.bars import Bar
from modules.console import format_count, format_duration, pluralize
from modules.errors import OptionError
from modules.media.buckets import Fit, Size
from modules.options import Options, option
from modules.pages.page import write_page
from protocols.data import LatentSpec
from protocols.rules import TokenCount

STDOUT = "-"  # of --json without a value

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).resolve().parent / "report.html"
CHECK_SIZES = ThumbnailSizes(clip_height=104, image_height=240, width=1180, quality=80)
REPORT_SIZES = ThumbnailSizes(clip_height=120, image_height=260, width=660, quality=78)
# limits of what is shown, so that the page of a large dataset can still be opened
MAX_CHARACTERS = 20_000  # of a caption
MAX_LOST = 1000  # characters of a part of a caption that no encoder reads
MAX_SPANS = 120  # spans of one length in the drawing of a clip
MAX_BUCKETS = 60  # buckets of a table whose drawings are shown
MAX_OUTLINES = 40  # outlines of different sizes in the drawing of a bucket
MARGIN = 3  # around the outlines of a drawing, in percent of its longer side
# for the template: lines of a list, rows of sizes and rates, groups of near duplicates, files of a group
LIMITS = {"max_lines": 200, "max_rows": 7, "max_groups": 60, "max_in_group": 12}
FILTERS = (  # (class of cards, label of the button that shows only these)
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


class ReportOptions(Options, title="report"):
    """Which dataset the report covers, for which model, and where the report is written."""

    key_files = (DATASET_FILE,)

    dataset_config: Path = option("dataset configuration, .toml or .json", required=True, by_place=True)
    output: Path | None = option("the HTML page to write; it is one file", place="new file")
    json: Path | None = option(
        "write the same numbers as JSON; without PATH, or with -, to standard output",
        nargs="?",
        const=STDOUT,
        place="new file",
    )
    items: int = option(
        "most files with thumbnails on the page: those with remarks first, then an even choice; 0 for none",
        default=200,
        minimum=0,
        hint="0 for no thumbnails",
    )
    fps: float = option(
        "frames per second of the model, for tables with source_fps: 16 for Wan, 24 for HunyuanVideo, "
        "Wan2.2 TI2V-5B, LTX-2 and MiniMax-H3, 30 for FramePack",
        default=16.0,
        above=0,
    )
    pixel_step: int = option(
        "sides of buckets are multiples of this: 16, or 32 for Wan2.2 TI2V-5B, LTX-2 and MiniMax-H3",
        default=16,
        minimum=1,
        maximum=1024,
        hint="16, or 32 for Wan2.2 TI2V-5B, LTX-2 and MiniMax-H3",
    )
    frame_step: int = option(
        "clips have a multiple of this number of frames, and one more: 4, or 8 for LTX-2; 17 for MiniMax-H3, "
        "five more; 1 for models of images",
        default=4,
        choices=(1, 4, 8, 17),
    )
    references: int = option(
        "most reference images of an image that the model takes, for models that edit images; 0: it "
        "takes none, and control images are counted as those of FramePack and Fun-Control",
        default=0,
        minimum=0,
        maximum=1000,
        hint="0 for a model without any",
    )
    no_decode: bool = option(
        "read headers only, for very large datasets: nothing is measured and no copies are found; only "
        "files with thumbnails are decoded"
    )
    files: bool = option(
        "add each file to the JSON: how it is cropped, its caption, what is wrong with it, and whether its "
        "caches are still valid"
    )
    no_download: bool = option("download nothing: a file at an address that is not here counts as broken")
    num_workers: int | None = option(
        "threads that read files; default: all cores but one. The result does not depend on it",
        minimum=1,
        maximum=1024,
    )

    def __post_init__(self) -> None:
        if self.output is None and self.json is None:
            raise OptionError("nothing would be written: pass --output page.html, --json, or both")
        if self.files and self.json is None:
            raise OptionError("--files adds to the JSON: pass --json too")
        if self.output is not None and self.output.suffix.lower() not in {".html", ".htm"}:
            raise OptionError(f"--output {self.output}: name a file that ends in .html")
        if self.json is not None and not self.prints and self.json.suffix.lower() != ".json":
            raise OptionError(f"--json {self.json}: name a file that ends in .json")

    @property
    def prints(self) -> bool:
        """Whether the JSON report goes to standard output."""
        return self.json is not None and str(self.json) == STDOUT


class SpanGroup(NamedTuple):
    """Frame spans of equal length in a clip, in percent of its used frames."""

    length: int  # frames
    positions: Sequence[tuple[float, float]]  # (start, width), at most MAX_SPANS
    num_spans: int  # of all spans


@dataclass(frozen=True)
class Card:
    """One media file as the report page shows it."""

    link_id: str  # names the card in links
    source: MediaSource
    inspection: Inspection
    errors: Sequence[str]
    warnings: Sequence[str]
    token_counts: Sequence[tuple[str, TokenCount]]  # (name of the encoder, count), of the first caption
    caption_parts: Sequence[Sequence[CaptionPart]]  # the captions as each group of encoders reads them
    span_groups: Sequence[SpanGroup]
    filter_classes: Sequence[str]  # by which the page filters
    references: Sequence[ShownReference]  # of an image; empty for clips


def write_check_page(
    path: Path,
    config: DatasetConfig,
    result: CheckResult,
    latent: LatentSpec,
    fps: float,
    maximum: int,
    workers: int,
    with_audio: bool = False,
) -> None:
    """Write the HTML page of a dataset check with at most `maximum` files.

    `with_audio` says that the model is trained with audio.

    Raises:
        OutputError: If the page cannot be written.
    """
    tables = result.tables
    card_settings = _CardSettings(CHECK_SIZES, latent, fps, counters=result.counters, with_audio=with_audio)
    cards = _make_cards(tables, maximum, workers, card_settings)
    num_files = sum(len(findings.sources) for findings in tables)
    table_sections = [
        (findings, _describe_settings(findings.table), _select_cards(cards, findings.table))
        for findings in tables
    ]
    template_values = {"result": result, "sections": table_sections, "files": num_files}
    title = f"{config.path.name}: {format_count(num_files, 'file')} checked"
    _write_page(path, title, template_values, cards=cards, fps=fps)


class _TableSection(NamedTuple):
    """What the report page shows of a dataset table; the template unpacks it in this order."""

    statistics: JsonObject
    drawings: list[JsonObject]  # what the largest buckets crop away
    num_not_drawn: int  # smaller buckets
    cards: list[Card]


def write_report_page(
    path: Path,
    config: DatasetConfig,
    tables: Sequence[TableFindings],
    statistics: JsonObject,
    options: ReportOptions,
    latent: LatentSpec,
    workers: int,
) -> None:
    """Write the HTML page of the dataset report.

    `statistics` is the result of `collect_statistics`; the page also shows cards of media files.

    Raises:
        OutputError: If the page cannot be written.
    """
    copies = frozenset(path for group in statistics["near_duplicates"] for path in group)
    card_settings = _CardSettings(REPORT_SIZES, latent, options.fps, copies=copies, with_audio=True)
    cards = _make_cards(tables, options.items, workers, card_settings)
    table_sections = []
    for table_statistics, findings in zip(statistics["tables"], tables, strict=True):
        drawings, num_not_drawn = _draw_crops(table_statistics, findings)
        table_cards = _select_cards(cards, findings.table)
        table_sections.append(_TableSection(table_statistics, drawings, num_not_drawn, table_cards))
    template_values = {
        "result": None,  # a page of --check has it instead of `report`
        "report": statistics,
        "sections": table_sections,
        "links": {str(card.source.path): card for card in cards},
        "number": _format_number,
        "in_words": format_duration,
    }
    _write_page(path, config.path.name, template_values, cards=cards, fps=options.fps)


def _select_cards(cards: Sequence[Card], table: DatasetTable) -> list[Card]:
    """Return the report cards of the files in a table."""
    return [card for card in cards if card.source.table is table]


def name_source(source: Path | str) -> str:
    """Return the heading for a dataset's folder or list file; the working folder is shown by its name."""
    return str(source) if Path(source).name else Path.cwd().name or str(source)


def _write_page(path: Path, title: str, values: Mapping[str, Any], cards: Sequence[Card], fps: float) -> None:
    """Write a page of the report from `values` and from the values that all its pages share."""
    filters = []
    for filter_class, label in FILTERS:
        num_cards = sum(filter_class in card.filter_classes for card in cards)
        if num_cards:
            filters.append((filter_class, label, num_cards))
    shared_values: dict[str, Any] = {
        "fps": fps,
        "cards": len(cards),
        "filters": filters,
        **LIMITS,
        "name_of": lambda path: Path(path).name,
        "source_name": name_source,
        "references_in_words": references_in_words,
        "count_words": pluralize,
    }
    write_page(path, TEMPLATE, title, {**shared_values, **values})
    logger.info("wrote %s", path)


# --- cards
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CardSettings:
    """Settings that all cards of a page share."""

    sizes: ThumbnailSizes
    latent: LatentSpec
    fps: float
    counters: TokenCounters = NO_TOKEN_COUNTERS
    copies: frozenset[str] = frozenset()  # paths of near duplicates
    with_audio: bool = False  # draw the sound of clips


@dataclass(frozen=True)
class _CardSource:
    """A media file that gets a card on the page, with the findings about it."""

    findings: TableFindings
    index: int  # of the source
    errors: Sequence[str]
    warnings: Sequence[str]

    @property
    def source(self) -> MediaSource:
        """The media file that the card shows."""
        return self.findings.sources[self.index]


def _make_cards(
    tables: Sequence[TableFindings], maximum: int, workers: int, card_settings: _CardSettings
) -> list[Card]:
    """Return cards for at most `maximum` media files, which are decoded again, in table order."""
    jobs = []
    # the indices of the sources to show, by table
    for findings, indices in zip(tables, select_sources(tables, maximum), strict=True):
        errors = group_by_stem(findings.errors)
        warnings = group_by_stem(findings.warnings)
        for index in indices:
            stem = findings.sources[index].stem
            job = _CardSource(
                findings,
                index,
                errors=errors.get(stem, []),
                warnings=warnings.get(stem, []),
            )
            jobs.append(job)
    results = read_ahead(
        jobs,
        get_source=lambda job: job.source,
        work=lambda job: _make_card(job, card_settings),
        workers=workers,
        bar=Bar(len(jobs), "Reading images", "file"),
    )
    cards = []
    for _, card in results:
        assert not isinstance(card, Failure)  # an error is not raised: the card shows it
        cards.append(card)
    return cards


def _make_card(job: _CardSource, card_settings: _CardSettings) -> Card:
    """Return the card that shows one media file on the report page; the file is decoded again for it."""
    source = job.source
    inspection = inspect_and_draw(
        source,
        card_settings.fps,
        card_settings.latent,
        card_settings.sizes,
        with_audio=card_settings.with_audio,
    )
    # the text about an empty caption is only its path: the card itself shows that it is empty
    paths = {str(source.path), str(source.caption_path)}
    errors = [text for text in job.errors if text not in paths]
    warnings = [text for text in job.warnings if text not in paths]
    # the check found no error, but the frames cannot be decoded here
    if inspection.read_error is not None and not errors:
        errors = [inspection.read_error]
    inspections = job.findings.inspections
    measures = inspections[job.index].measures if inspections else None
    token_counts, caption_parts = _split_captions(source, card_settings.counters)
    # CSS classes by which the page filters its cards; "cut" is for files that lose much to cropping
    belongs_to_class = {
        "faulty": bool(errors),
        "told": bool(warnings),
        **_classify_measures(measures),
        "copy": str(source.path) in card_settings.copies,
        "cut": inspection.cut_percent > 20,
    }
    return Card(
        link_id=f"file-{job.findings.table.index + 1}-{job.index}",
        source=source,
        inspection=replace(inspection, measures=measures),
        errors=errors,
        warnings=warnings,
        token_counts=token_counts,
        caption_parts=caption_parts,
        span_groups=_group_spans(inspection),
        filter_classes=[name for name, belongs in belongs_to_class.items() if belongs],
        references=show_references(source, inspection.fit, card_settings.sizes),
    )


def _split_captions(
    source: MediaSource, counters: TokenCounters
) -> tuple[list[tuple[str, TokenCount]], list[list[CaptionPart]]]:
    """Return (encoder, token count) pairs of a media file's first caption, and the parts of all captions."""
    captions = [] if source.caption is None else [source.caption, *source.more_captions]
    first_counts: list[tuple[str, TokenCount]] = []
    parts: list[list[CaptionPart]] = []
    for index, caption in enumerate(captions):
        counts = counters.count(caption) if caption else []
        parts += split_caption(caption, counts)
        if index == 0:
            first_counts = counts
    return first_counts, parts


def _classify_measures(measures: Measures | None) -> dict[str, bool]:
    """Return the classes by which the page filters a media file, judged by its measures; {} without any."""
    if measures is None:
        return {}
    return {"black": measures.is_black, "static": measures.is_static, "blurred": measures.is_blurred}


def select_sources(tables: Sequence[TableFindings], maximum: int) -> list[list[int]]:
    """Select at most `maximum` media files to show: first files with errors, then those with warnings.

    Files are selected evenly from each group. Returns, for each table, the indices of its sources in order.
    """
    selected: list[list[int]] = [[] for _ in tables]
    num_left = maximum
    for group in _group_by_severity(tables):
        count = min(num_left, len(group))
        num_left -= count
        if count:
            for table_index, source_index in select_evenly(group, count):
                selected[table_index].append(source_index)
    return selected


def _group_by_severity(tables: Sequence[TableFindings]) -> tuple[list[tuple[int, int]], ...]:
    """Return the sources with errors, those with only warnings, and the others."""
    # Each source is a pair of the index of its table and its index in the table.
    with_errors: list[tuple[int, int]] = []
    with_warnings: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    for table_index, findings in enumerate(tables):
        stems_with_errors = {error.stem for error in findings.errors}
        stems_with_warnings = {warning.stem for warning in findings.warnings}
        for source_index, source in enumerate(findings.sources):
            if source.stem in stems_with_errors:
                with_errors.append((table_index, source_index))
            elif source.stem in stems_with_warnings:
                with_warnings.append((table_index, source_index))
            else:
                others.append((table_index, source_index))
    return with_errors, with_warnings, others


def split_caption(caption: str, counts: Sequence[tuple[str, TokenCount]]) -> list[list[CaptionPart]]:
    """Split a caption at each encoder's maximum length; encoders with the same limit share one result."""
    if not counts:
        return [[(_shorten(caption, MAX_CHARACTERS), (), False)]]
    by_text: dict[str, list[tuple[str, TokenCount]]] = {}
    for name, count in counts:
        by_text.setdefault(count.text, []).append((name, count))
    return [_split_text(text, readers) for text, readers in by_text.items()]


def _split_text(text: str, readers: Sequence[tuple[str, TokenCount]]) -> list[CaptionPart]:
    """Split a text wherever one of the text encoders reaches its maximum length."""
    # `readers` are pairs of an encoder's name and its count of the text's tokens.
    ends = sorted({0, len(text), *(count.num_read for _, count in readers)})
    segments = []
    for start, end in zip(ends, ends[1:], strict=False):
        unread = tuple(name for name, count in readers if count.num_read <= start)
        is_lost = len(unread) == len(readers)
        shown = _shorten(text[start:end], MAX_LOST if is_lost else MAX_CHARACTERS)
        segments.append((shown, unread, is_lost))
    return segments


def _shorten(text: str, maximum: int) -> str:
    """Truncate a text to `maximum` characters, and append the number of missing characters."""
    if len(text) <= maximum:
        return text
    return f"{text[:maximum]} [... and {len(text) - maximum:,} more characters]"


def _group_spans(inspection: Inspection) -> list[SpanGroup]:
    """Return the spans of a clip's items, grouped by their length."""
    by_length: dict[int, list[tuple[float, float]]] = {}
    num_frames = max(inspection.num_used_frames, 1)
    for start, length in inspection.spans:
        position = (100 * start / num_frames, 100 * length / num_frames)
        by_length.setdefault(length, []).append(position)
    groups = []
    for length, positions in sorted(by_length.items()):
        groups.append(SpanGroup(length, positions[:MAX_SPANS], len(positions)))
    return groups


def _describe_settings(table: DatasetTable) -> str:
    """Return the settings of a table in one line."""
    width, height = table.buckets.resolution
    buckets = "buckets" if table.buckets.enable_bucket else "one size"
    settings = [f"{width}x{height}, {buckets}", f"batch_size {table.learning.batch_size}"]
    if table.learning.num_repeats != 1:
        settings.append(f"num_repeats {table.learning.num_repeats}")
    if table.kind == "video":
        frame_counts = f": {', '.join(map(str, table.buckets.target_frames))} frames"
        settings.append(
            table.buckets.frame_extraction
            + ("" if table.buckets.frame_extraction == "full" else frame_counts)
        )
        if table.buckets.source_fps is not None:
            settings.append(f"source_fps {table.buckets.source_fps}")
    for name in TIMESTEP_KEYS:
        value = table.value_of(name)
        if value is not None:
            settings.append(f"{name} {value:g}")
    if table.learning.validation:
        settings.append("for validation")
    return "; ".join(settings)


# --- drawings
# ------------------------------------------------------------------------------------------------------------


def _draw_crops(table: JsonObject, findings: TableFindings) -> tuple[list[JsonObject], int]:
    """Return drawings of what the largest buckets crop away, and the number of bucket sizes not drawn."""
    # A drawing shows the most frequent outlines of sources around the part that the bucket keeps.
    # buckets of clips of several lengths share a size
    buckets_by_size: dict[Size, list[JsonObject]] = {}
    num_items: Counter[Size] = Counter()
    for bucket in table["buckets"]:
        size = (bucket["width"], bucket["height"])
        buckets_by_size.setdefault(size, []).append(bucket)
        num_items[size] += bucket["items"]
    largest = sorted(buckets_by_size, key=lambda size: -num_items[size])[:MAX_BUCKETS]
    fits_by_size = count_fits(findings)
    drawings = []
    for size, buckets in buckets_by_size.items():
        if size in largest:
            drawings.append({"rows": buckets, **_draw_outlines(size, fits_by_size[size])})
    return drawings, len(buckets_by_size) - len(drawings)


def _draw_outlines(size: Size, fits: Counter[Fit]) -> JsonObject:
    """Return the data of a drawing: the most frequent image outlines around a bucket of `size`."""
    most_common = fits.most_common(MAX_OUTLINES)
    # corners of the outlines relative to the corner of the bucket
    left = min(-fit.crop[0] for fit, _ in most_common)
    top = min(-fit.crop[1] for fit, _ in most_common)
    right = max(fit.resized[0] - fit.crop[0] for fit, _ in most_common)
    bottom = max(fit.resized[1] - fit.crop[1] for fit, _ in most_common)
    width, height = right - left, bottom - top
    pad = MARGIN * max(width, height) / 100  # MARGIN is in percent
    summary = f"{fits.total():,} files, outlines of {len(fits):,} sizes around the kept part"
    return {
        "view": f"{left - pad:g} {top - pad:g} {width + 2 * pad:g} {height + 2 * pad:g}",
        "text": f"{size[0]} x {size[1]}: {summary}",
        # x, y, width and height of an outline, number of files
        "boxes": [(-fit.crop[0], -fit.crop[1], *fit.resized, count) for fit, count in most_common],
    }


def _format_number(value: float) -> str:
    """Format a whole number with thousands separators, and another number with three significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
