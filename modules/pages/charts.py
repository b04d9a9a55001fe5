"""Draw curves over steps, with axes, for a page."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby

from markupsafe import Markup, escape

from modules.control_codes import escape_control_codes
from modules.pages.page import SHEET, as_url

FADED = 0.3  # opacity of the values behind a smoothed curve
WIDTH, HEIGHT = 500, 300  # pixels: labels can be read on a phone, and two fit side by side on a desk
LEFT, RIGHT, TOP, BOTTOM = 76, 486, 30, 250  # edges of the area of the curves
ROOM = 0.05  # share of the values' range that stays free on each side
MAX_TICKS = 6  # of an axis
COLOURS = [*(f"var(--ink-{number})" for number in range(1, 7)), "var(--ink)", "var(--faint)"]
RULE, AXIS = "var(--rule)", "var(--faint)"
LOOK = SHEET.partition("@media print")[0]  # its colors, light and dark
START = (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"'
    ' font-family="system-ui, sans-serif" font-size="14" text-anchor="middle" fill="var(--ink)">'
    f"<style>{LOOK}</style>"
)
Point = tuple[float, float]  # x y of the drawing


@dataclass(frozen=True)
class Curve:
    """One curve of a chart: values y over x. With `smoothing` above 0, an average covers the faded values."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    smoothing: float = 0.0  # 0 to below 1, as in TensorBoard
    # lowest and highest value behind each y, if y are means: drawn as a band
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    has_dots: bool = False  # show each value, for curves with few values
    best: int | None = None  # index of a value to mark


@dataclass(frozen=True)
class Chart:
    """A chart: curves and the labels of its axes."""

    curves: Sequence[Curve]
    x_label: str
    y_label: str
    title: str


def draw_chart(chart: Chart) -> Markup:
    """Return an image tag with a chart; an SVG image can neither run scripts nor load other files.

    NaN and infinite values leave a gap.
    """
    x_values: list[float] = []
    y_values: list[float] = []
    for curve in chart.curves:
        x_values += curve.x
        y_values += [*curve.y, *(curve.low or []), *(curve.high or [])]
    x_scale = _Scale(x_values, LEFT, RIGHT)
    y_scale = _Scale(y_values, BOTTOM, TOP)
    colored = list(zip(chart.curves, cycle(COLOURS), strict=False))
    svg_parts = [START, *_draw_frame(x_scale, y_scale)]
    for curve, color in colored:
        svg_parts += _draw_curve(curve, x_scale, y_scale, color)
    svg_parts += _draw_labels(chart)
    if len(chart.curves) > 1:  # a legend of the curves' names
        y = TOP + 15
        for curve, color in colored:
            svg_parts.append(_draw_text(RIGHT - 4, y, curve.name, f'text-anchor="end" fill="{color}"'))
            y += 17
    drawing = as_url("image/svg+xml", "".join([*svg_parts, "</svg>"]).encode())
    return Markup('<img class="chart" src="{}" alt="{}">').format(drawing, chart.title)


def _draw_labels(chart: Chart) -> Iterator[str]:
    """Yield the SVG text of both axis labels and the title."""
    center = (LEFT + RIGHT) / 2
    middle = (TOP + BOTTOM) / 2
    yield _draw_text(center, HEIGHT - 8, chart.x_label)
    yield _draw_text(12, middle, chart.y_label, f'transform="rotate(-90 12 {middle:g})"')
    yield _draw_text(center, TOP - 11, chart.title, 'font-size="16"')


def _draw_frame(x_scale: "_Scale", y_scale: "_Scale") -> Iterator[str]:
    """Yield both axes, with a grid line and a label at each tick."""
    for position, label in x_scale.ticks():
        yield from _draw_lines([(position, TOP), (position, BOTTOM)], RULE)
        yield _draw_text(position, BOTTOM + 19, label)
    for position, label in y_scale.ticks():
        yield from _draw_lines([(LEFT, position), (RIGHT, position)], RULE)
        yield _draw_text(LEFT - 6, position + 5, label, 'text-anchor="end"')
    yield from _draw_lines([(LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)], AXIS)


class _Scale:
    """Scale of a chart's axis: maps values to pixels."""

    def __init__(self, values: Iterable[float], start: float, end: float) -> None:
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low = min(finite)
        high = max(finite)
        room = (high - low or abs(high) or 1.0) * ROOM
        self._low = low - room
        self._high = high + room
        self._start = start
        self._end = end

    def to_pixels(self, value: float) -> float:
        return self._start + (self._end - self._start) * (value - self._low) / (self._high - self._low)

    def ticks(self) -> Iterator[tuple[float, str]]:
        span = self._high - self._low
        step = 10.0 ** math.floor(math.log10(span / MAX_TICKS))
        step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= MAX_TICKS)
        first = math.ceil(self._low / step)
        last = math.floor(self._high / step)
        for number in range(first, last + 1):
            yield self.to_pixels(number * step), f"{number * step:.6g}"


def _draw_curve(curve: Curve, x_scale: _Scale, y_scale: _Scale, colour: str) -> Iterator[str]:
    """Yield the elements of a curve: its band, its lines, its dots and the star at its best value."""
    x = [x_scale.to_pixels(value) for value in curve.x]
    if curve.low is not None and curve.high is not None:
        low = _locate_points(x, curve.low, y_scale)
        high = _locate_points(x, curve.high, y_scale)
        yield from _draw_band(low, high, colour)
    points = _locate_points(x, curve.y, y_scale)
    yield from _draw_lines(points, colour, FADED if curve.smoothing else 1.0)
    if curve.smoothing:
        smoothed = _locate_points(x, smooth(curve.y, curve.smoothing), y_scale)
        yield from _draw_lines(smoothed, colour)
    yield from _draw_marks(curve, points, colour)


def _draw_marks(curve: Curve, points: Sequence[Point], colour: str) -> Iterator[str]:
    """Yield a dot at each finite point of a curve with dots, and the star at its best value."""
    if curve.has_dots:
        for left, top in points:
            if math.isfinite(top):
                yield f'<circle cx="{left:.1f}" cy="{top:.1f}" r="2" fill="{colour}"/>'
    if curve.best is not None:
        left, top = points[curve.best]
        if math.isfinite(top):
            yield _draw_text(left, top + 6, "\N{BLACK STAR}", f'font-size="18" fill="{colour}"')


def _locate_points(x: Sequence[float], values: Sequence[float], y_scale: _Scale) -> list[Point]:
    """Return the pixel positions of a curve's points, given x in pixels; a NaN value leaves a gap."""
    y = [y_scale.to_pixels(value) if math.isfinite(value) else math.nan for value in values]
    return list(zip(x, y, strict=True))


def _draw_band(low: Sequence[Point], high: Sequence[Point], colour: str) -> Iterator[str]:
    """Yield an SVG area between two curves for each run of consecutive points that are finite in both."""

    def are_finite(edges: tuple[Point, Point]) -> bool:
        return all(math.isfinite(y) for _, y in edges)

    for is_drawn, run in groupby(zip(low, high, strict=True), are_finite):
        if is_drawn:
            below, above = zip(*run, strict=True)
            corners = _format_points([*below, *reversed(above)])
            yield f'<polygon points="{corners}" fill="{colour}" fill-opacity="{FADED / 2}"/>'


def _draw_lines(points: Sequence[Point], colour: str, opacity: float = 1.0) -> Iterator[str]:
    """Yield an SVG line for each run of consecutive finite points."""
    look = f'fill="none" stroke="{colour}" stroke-opacity="{opacity}"'
    for is_finite, run in groupby(points, lambda point: math.isfinite(point[1])):
        if is_finite:
            ends = list(run)
            ends += ends if len(ends) == 1 else []  # a line of no length is a dot where its ends are round
            yield (
                f'<polyline points="{_format_points(ends)}" {look}'
                ' stroke-width="1.5" stroke-linecap="round" stroke-linejoin="round"/>'
            )


def _format_points(points: Iterable[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _draw_text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(escape_control_codes(text))}</text>'


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Return the exponential moving average with the bias of its start removed, as TensorBoard draws it.

    `weight` is at least 0 (no smoothing) and below 1. NaN and infinite values are passed through and not
    averaged. Source: Kingma and Ba 2015, arXiv 1412.6980, section 3 (bias correction).
    """
    average, debias, smoothed = 0.0, 0.0, []
    for value in values:
        if not math.isfinite(value):
            smoothed.append(value)
            continue
        average = weight * average + (1 - weight) * value
        debias = weight * debias + (1 - weight)
        smoothed.append(average / debias)
    return smoothed
