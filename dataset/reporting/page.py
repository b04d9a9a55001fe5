"""Write the page of the report: one HTML file that fetches nothing and runs no script."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dataset.config import DatasetConfig
from dataset.reporting.cards import make_cards
from dataset.reporting.drawing import draw_bins, draw_crops, number
from dataset.reporting.numbers import Numbers
from dataset.reporting.options import ReportOptions
from dataset.reporting.tables import TableReport
from dataset.sources.steps import Steps
from modules.console import in_words
from modules.control_codes import escape_control_codes
from modules.pages.page import write_page

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).resolve().parent / "report.html"
MOST_LINES = 100  # of one list
MOST_BUCKETS = 60  # sizes of a table
MOST_ROWS = 7  # of sizes and rates
MOST_GROUPS = 60  # of files that are nearly the same
MOST_IN_GROUP = 12
FILTERS = (
    ("faulty", "with faults"),
    ("told", "with remarks"),
    ("copy", "near-duplicates"),
    ("black", "black"),
    ("static", "static"),
    ("blurred", "blurred"),
    ("cut", "a fifth or more cut off"),
)


@dataclass(frozen=True)
class Drawings:
    """The drawings of a table, or of all of them."""

    histograms: Sequence[tuple[str, str, Markup]]  # title, summary, drawing
    # the buckets of one size, and what they cut off
    crops: Sequence[tuple[Sequence[Numbers], Markup]] = ()
    more: int = 0  # sizes that are not drawn


def write_report_page(
    path: Path,
    config: DatasetConfig,
    reports: Sequence[TableReport],
    numbers: Numbers,
    options: ReportOptions,
    steps: Steps,
    workers: int,
) -> None:
    """Write the page. numbers: the result of `collect_numbers`; the page shows nothing else.

    Raises OutputError if the page cannot be written.
    """
    cards = make_cards(reports, numbers["near_duplicates"], options.fps, steps, options.items, workers)
    shown = _escape(numbers)
    by_path = {card.path: card for card in cards}
    values = {
        "report": shown,
        "sections": [
            (
                table,
                _draw_table(table, report),
                [card for card in cards if card.table == report.table.index + 1],
            )
            for table, report in zip(shown["tables"], reports, strict=True)
        ],
        "together": _draw_numbers(shown) if len(reports) > 1 else None,
        "groups": [
            [(_name(one), escape_control_codes(one), by_path.get(one)) for one in group[:MOST_IN_GROUP]]
            for group in numbers["near_duplicates"][:MOST_GROUPS]
        ],
        "links": {escape_control_codes(path): card for path, card in by_path.items()},
        "filters": [
            (mark, words, sum(mark in card.marks for card in cards))
            for mark, words in FILTERS
            if any(mark in card.marks for card in cards)
        ],
        "cards": len(cards),
        "most_lines": MOST_LINES,
        "most_rows": MOST_ROWS,
        "most_groups": MOST_GROUPS,
        "most_in_group": MOST_IN_GROUP,
        "number": number,
        "in_words": in_words,
    }
    write_page(path, TEMPLATE, escape_control_codes(config.path.name), values)
    logger.info("wrote %s", path)


def _draw_table(table: Numbers, report: TableReport) -> Drawings:
    by_size: dict[tuple[int, int], list[Numbers]] = {}
    for bucket in table["buckets"]:
        by_size.setdefault((bucket["width"], bucket["height"]), []).append(bucket)
    by_items = sorted(by_size, key=lambda size: -sum(row["items"] for row in by_size[size]))
    shown = set(by_items[:MOST_BUCKETS])
    crops = [(rows, draw_crops(size, report.crops[size])) for size, rows in by_size.items() if size in shown]
    return Drawings(_draw_numbers(table).histograms, crops, len(by_size) - len(crops))


def _draw_numbers(numbers: Numbers) -> Drawings:
    """Draw the distributions that a table and the whole report have in common."""
    durations, captions = numbers["durations"], numbers["captions"]
    drawn = [
        (
            "Durations",
            durations["seconds"],
            draw_bins(durations["histogram"], "Durations", "s", "clips"),
            " s",
        ),
        (
            "Words in a caption",
            captions["words"],
            draw_bins(captions["words_histogram"], "Lengths", "words", "captions"),
            "",
        ),
    ]
    for name in ("brightness", "sharpness", "motion"):
        found = numbers[name]
        drawn.append(
            (
                name.capitalize(),
                found["values"],
                draw_bins(found["histogram"], name.capitalize(), "", "files"),
                "",
            )
        )
    return Drawings(
        [(title, _summary(values, unit), drawing) for title, values, drawing, unit in drawn if values], []
    )


def _summary(values: Numbers, unit: str) -> str:
    low, middle, high = (number(values[name]) for name in ("min", "median", "max"))
    if low == high:
        return f"all {low}{unit}"
    return f"{low} to {high}{unit}, median {middle}"


def _escape(value: Any) -> Any:
    """Write out the control codes in all texts of JSON values: they would hide or reorder the text."""
    if isinstance(value, str):
        return escape_control_codes(value)
    if isinstance(value, dict):
        return {key: _escape(one) for key, one in value.items()}
    return [_escape(one) for one in value] if isinstance(value, list) else value


def _name(path: str) -> str:
    return escape_control_codes(Path(path).name)
