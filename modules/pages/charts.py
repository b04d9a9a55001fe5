"""Draw curves over steps, with axes, for a page or as a file."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from modules.pages.embedding import embed_svg

FADED = 0.3  # opacity of the values behind a smoothed curve


@dataclass(frozen=True)
class Curve:
    """Hold one curve: values y over x. `smoothing` above 0 draws the average in front of faded values."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    smoothing: float = 0.0  # 0 to below 1, as in TensorBoard


def draw_curves(curves: Sequence[Curve], x_label: str, y_label: str, title: str) -> Markup:
    """Return an image tag with the curves in one diagram. NaN and infinite values leave a gap."""
    # text is text, not a formula; equal curves give equal files
    with rc_context({"text.parse_math": False, "svg.hashsalt": "reelsmith"}):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            (line,) = axes.plot(curve.x, curve.y, label=curve.name, alpha=FADED if curve.smoothing else 1.0)
            if curve.smoothing:
                axes.plot(curve.x, smooth(curve.y, curve.smoothing), color=line.get_color(), label=curve.name)
                line.set_label("_hidden")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
        data = io.StringIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
    return embed_svg(data.getvalue(), title)


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
