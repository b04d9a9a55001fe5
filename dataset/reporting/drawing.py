"""Draw the numbers of the report: histograms, and the parts that each bucket cuts off."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from dataset.reporting.tables import Crops
from modules.pages.charts import draw_histogram

MOST_OUTLINES = 40  # different sizes that are drawn in a bucket
MARGIN = 3  # percent of the drawing


def draw_bins(bins: Sequence[Mapping[str, Any]], what: str, unit: str, things: str) -> Markup:
    """Return a histogram of `count_bins`. what, unit: of the numbers; things: the counted things."""
    if not bins:
        return Markup("")
    ends = [f"{number(one['from'])} to {number(one['to'])} {unit}".strip() for one in bins]
    bars = [
        (number(one["from"]), f"{end}: {one['count']:,} {things}", one["count"])
        for one, end in zip(bins, ends, strict=True)
    ]
    total = sum(one["count"] for one in bins)
    low, high = number(bins[0]["from"]), number(bins[-1]["to"])
    text = f"{what} of {total:,} {things}, from {low} to {high} {unit}".strip()
    return draw_histogram(bars, text, f"{high} {unit}".strip())


def draw_crops(bucket: tuple[int, int], crops: Crops) -> Markup:
    """Return an SVG of a bucket and the outlines of the sources fitted to it, which are cut to it.

    Each outline is as strong as it is frequent; of very many different ones the most frequent are drawn.
    """
    width, height = bucket
    outlines = crops.fits.most_common(MOST_OUTLINES)
    # where the edges of the whole source lie, if the bucket's corner is 0, 0
    boxes = [(-fit.crop[0], -fit.crop[1], fit.resized[0], fit.resized[1], count) for fit, count in outlines]
    left, top = min(x for x, *_ in boxes), min(y for _, y, *_ in boxes)
    right = max(x + w for x, _, w, _, _ in boxes)
    bottom = max(y + h for _, y, _, h, _ in boxes)
    pad = MARGIN * max(right - left, bottom - top) / 100
    view = f"{left - pad:g} {top - pad:g} {right - left + 2 * pad:g} {bottom - top + 2 * pad:g}"
    total = crops.fits.total()
    text = f"{width} x {height}: {total:,} files, outlines of {len(crops.fits):,} sizes around what is kept"
    parts = [Markup('<svg class="crops" viewBox="{}" role="img" aria-label="{}">').format(view, text)]
    for x, y, w, h, count in boxes:
        strength = 0.25 + 0.75 * count / outlines[0][1]
        words = f"{count:,} files, resized to {w} x {h}"
        shape = '<rect class="whole" x="{}" y="{}" width="{}" height="{}" opacity="{:.2f}">'
        title = Markup("<title>{}</title></rect>").format(words)
        parts.append(Markup(shape).format(x, y, w, h, strength) + title)
    for name in ("ground", "kept"):
        parts.append(Markup('<rect class="{}" width="{}" height="{}"/>').format(name, width, height))
    return Markup("").join([*parts, Markup("</svg>")])


def number(value: float) -> str:
    """Return a number as short text."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
