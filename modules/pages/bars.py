"""Draw a histogram as SVG that takes its colours from the page, so that it is right in light and in dark."""

from collections.abc import Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 320, 110  # of the drawing, in its own units
FLOOR, TOP = 92, 16  # the lower end of the bars, and the upper one of the highest
GAP = 2  # between bars

Bar = tuple[str, str, int]  # text below its left edge, what it says in words, how many


def draw_histogram(bars: Sequence[Bar], text: str, end: str = "") -> Markup:
    """Return an SVG with one bar for each entry; `text` says what it shows, `end` stands at the right edge.

    The page gives it colours by the class `histogram`. Every text is escaped.
    """
    if not bars:
        return Markup("")
    most = max(count for *_, count in bars) or 1
    step = WIDTH / len(bars)
    parts = [
        Markup('<svg class="histogram" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            WIDTH, HEIGHT, text
        )
    ]
    shown = max(range(len(bars)), key=lambda index: bars[index][2])  # the highest bar has its number on it
    for index, (_, words, count) in enumerate(bars):
        height = (FLOOR - TOP) * count / most
        height = max(height, 1.5) if count else 0
        parts.append(
            Markup(
                '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="1"><title>{}</title></rect>'
            ).format(index * step + GAP / 2, FLOOR - height, step - GAP, height, words)
        )
    parts.append(Markup('<path d="M0 {0}H{1}"/>').format(FLOOR, WIDTH))
    place = min(max((shown + 0.5) * step, 12), WIDTH - 12)
    parts.append(
        Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            place, TOP - 4, f"{bars[shown][2]:,}"
        )
    )
    parts.append(Markup('<text x="0" y="{}">{}</text>').format(HEIGHT - 3, bars[0][0]))
    if len(bars) > 2:
        middle = len(bars) // 2
        parts.append(
            Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                middle * step, HEIGHT - 3, bars[middle][0]
            )
        )
    parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(WIDTH, HEIGHT - 3, end))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)
