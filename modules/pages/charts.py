"""Draw curves over steps, with axes, for a page or as a file."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from modules.pages.page import embed_svg

FADED = 0.3  # opacity of the values behind a smoothed curve
SIZE = (5.0, 3.0)  # inches: texts can be read on a phone, and two fit side by side on a desk


@dataclass(frozen=True)
class Curve:
    """Hold one curve: values y over x. `smoothing` above 0 draws the average in front of faded values."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    smoothing: float = 0.0  # 0 to below 1, as in TensorBoard
    # lowest and highest value behind each y, if y are means: drawn as a band
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    has_dots: bool = False  # show each value, for curves of few
    best: int | None = None  # index of a value to mark


@dataclass(frozen=True)
class Chart:
    """Hold one diagram: curves and the labels of its axes."""

    curves: Sequence[Curve]
    x_label: str
    y_label: str
    title: str


def draw_chart(chart: Chart) -> Markup:
    """Return an image tag with a diagram. NaN and infinite values leave a gap."""
    from matplotlib import rc_context  # slow: a page is drawn when the first steps are done
    from matplotlib.figure import Figure

    # text is text, not a formula, and drawn by the browser; equal curves give equal files
    settings: Any = {"text.parse_math": False, "svg.hashsalt": "reelsmith", "svg.fonttype": "none"}
    with rc_context(settings):
        figure = Figure(figsize=SIZE)
        # fixed margins: measuring all texts would double the time
        figure.subplots_adjust(0.16, 0.17, 0.97, 0.9)
        _draw(figure.subplots(), chart)
        data = io.StringIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
    return embed_svg(data.getvalue(), chart.title)


def _draw(axes: Any, chart: Chart) -> None:
    for curve in chart.curves:
        marker = "o" if curve.has_dots else ""
        alpha = FADED if curve.smoothing else 1.0
        (line,) = axes.plot(curve.x, curve.y, label=curve.name, alpha=alpha, marker=marker, markersize=3)
        colour = line.get_color()
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=FADED / 2, linewidth=0)
        if curve.smoothing:
            axes.plot(curve.x, smooth(curve.y, curve.smoothing), color=colour, label=curve.name)
            line.set_label("_hidden")
        if curve.best is not None:
            axes.plot(curve.x[curve.best], curve.y[curve.best], "*", color=colour, markersize=13)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.set_title(chart.title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(chart.curves) > 1:
        axes.legend()


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Return the exponential moving average with the bias of its start removed, as TensorBoard draws it.

    weight: 0 (the values themselves) to below 1. NaN and infinite values are passed through and not averaged.
    Source: Kingma and Ba 2015, arXiv 1412.6980, section 3 (bias correction).
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
