"""A card for each file that the page shows: its frames with the crop, its numbers and its caption."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dataset.caching.prefetch import read_ahead
from dataset.caching.reports import Failure
from dataset.checking.looks import (
    EvenFrames,
    MediaLook,
    draw_strip,
    fill_strip,
    read_source,
    reduce_to_height,
)
from dataset.checking.page import choose_sources, shorten_caption, told_by_source
from dataset.reporting.measuring import Measured, Measures
from dataset.reporting.tables import TableReport
from dataset.sources.media_source import MediaSource
from dataset.sources.steps import Steps
from modules.bars import Bar
from modules.control_codes import escape_control_codes
from modules.pages.page import embed_picture

CLIP_HEIGHT, CLIP_WIDTH = 120, 660  # of a strip, in pixels
PICTURE_HEIGHT, PICTURE_WIDTH = 260, 660
SMALL = 150  # longer side in a group of copies
MOST_CHARACTERS = 20_000  # of a caption


@dataclass(frozen=True)
class ReportCard:
    """One file as the page shows it."""

    name: str
    place: str  # names the card in links
    table: int  # from 1
    kind: str
    path: str
    strip: Markup | None
    small: Markup | None
    look: MediaLook
    measures: Measures | None
    faults: Sequence[str]
    remarks: Sequence[str]
    captions: Sequence[str]
    marks: Sequence[str]  # classes by which the page filters

    @property
    def lengths(self) -> str:
        """Return the items in words: "2 x 5, 1 x 9 frames"; empty if there is none."""
        lengths = Counter(length for _, length in self.look.spans)
        parts = ", ".join(f"{count} \u00d7 {length}" for length, count in sorted(lengths.items()))
        return f"{parts} frames" if parts else ""


def make_cards(
    reports: Sequence[TableReport],
    copies: Sequence[Sequence[str]],
    fps: float,
    steps: Steps,
    most: int,
    workers: int,
) -> list[ReportCard]:
    """Read at most `most` files once more and return their cards, in the order of their tables.

    Files with findings come first, then an even choice; only a few small frames of each are kept. copies:
    groups of paths that are nearly the same.
    """
    tables = [report.found for report in reports]
    told = told_by_source(tables)
    in_groups = {path for group in copies for path in group}
    chosen = [source for sources in choose_sources(tables, most) for source in sources]
    keys = {(source.table.index, source.stem) for source in chosen}
    measured = {
        key: one
        for report in reports
        for one in report.measured
        if (key := (report.table.index, report.found.sources[one.place].stem)) in keys
    }

    def work(source: MediaSource) -> ReportCard:
        paths = {escape_control_codes(str(path)) for path in (source.path, source.caption_path)}
        one = measured.get((source.table.index, source.stem))
        faults, remarks = (
            [
                fault.text
                for fault in told.get((kind, source.table.index, source.stem), [])
                if fault.text not in paths  # an empty caption, which the card shows
            ]
            for kind in ("fault", "remark")
        )
        return _make_card(source, one, faults, remarks, str(source.path) in in_groups, fps, steps)

    cards = []
    bar = Bar(len(chosen), "Drawing", "file")
    for _, card in read_ahead(chosen, lambda one: one, work, workers, bar):
        assert not isinstance(card, Failure)  # what cannot be read is told on the card
        cards.append(card)
    return cards


def _make_card(
    source: MediaSource,
    one: Measured | None,
    faults: list[str],
    remarks: list[str],
    is_copy: bool,
    fps: float,
    steps: Steps,
) -> ReportCard:
    is_clip = source.table.kind == "video"
    height, width = (CLIP_HEIGHT, CLIP_WIDTH) if is_clip else (PICTURE_HEIGHT, PICTURE_WIDTH)
    sample = EvenFrames(lambda frame: reduce_to_height(frame, height, width))
    look = read_source(source, fps, steps, sample.add)
    name = escape_control_codes(source.path.name)
    strip = small = None
    if sample.frames:
        frames = draw_strip(fill_strip(sample.frames, width), look.fit)
        strip = embed_picture(frames, name, width, quality=78)
        small = embed_picture(sample.frames[len(sample.frames) // 2], name, SMALL, quality=70)
    if look.problem is not None and not faults:
        faults = [escape_control_codes(look.problem)]
    measures = one.measures if one else None
    captions = [] if source.caption is None else [source.caption, *source.more_captions]
    flags = {
        "faulty": bool(faults),
        "told": bool(remarks),
        "black": measures is not None and measures.is_black,
        "static": measures is not None and measures.is_static,
        "blurred": measures is not None and measures.is_blurred,
        "copy": is_copy,
        "cut": look.cut_percent > 20,
    }
    return ReportCard(
        name,
        f"file-{source.table.index + 1}-{one.place if one else source.stem}",
        source.table.index + 1,
        source.table.kind,
        str(source.path),
        strip,
        small,
        look,
        measures,
        faults,
        remarks,
        [shorten_caption(text, MOST_CHARACTERS) for text in captions],
        [mark for mark, is_set in flags.items() if is_set],
    )
