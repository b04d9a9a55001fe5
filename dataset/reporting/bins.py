"""Summaries and histograms of numbers, as JSON values."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_BINS = 16
DIGITS = 6


def summarise(values: Sequence[float]) -> dict[str, Any] | None:
    """Return count, min, median, mean, max and total of numbers; None if there are none."""
    if not len(values):
        return None
    numbers = np.asarray(values, np.float64)
    found = {
        "count": len(numbers),
        "min": numbers.min(),
        "median": np.median(numbers),
        "mean": numbers.mean(),
        "max": numbers.max(),
        "total": numbers.sum(),
    }
    return {name: _plain(value) for name, value in found.items()}


def count_bins(values: Sequence[float]) -> list[dict[str, Any]]:
    """Return a histogram: `from` (included), `to` (not included but in the last bin) and `count` of each bin.

    All bins are equally wide, 1, 2 or 5 times a power of ten, and there are at most about 16. A few far
    larger values share the last bin, so that they do not squeeze all others into one.
    """
    if not len(values):
        return []
    numbers = np.asarray(values, np.float64)
    low, high = float(numbers.min()), float(numbers.max())
    usual = float(np.quantile(numbers, 0.98))
    end = high if high <= 2 * usual - low else usual
    width = _round_width((end - low) / MOST_BINS, bool((numbers == np.floor(numbers)).all()))
    start = math.floor(low / width) * width
    count = math.floor((end - start) / width + 1e-9) + 1
    count += high >= start + count * width  # the last bin takes what is far larger
    places = np.minimum(np.floor((numbers - start) / width + 1e-9).astype(np.int64), count - 1)
    sums = np.bincount(places, minlength=count)
    edges = [start + index * width for index in range(count)]
    tops = [*edges[1:], max(high, start + count * width)]
    return [
        {"from": _plain(edge), "to": _plain(top), "count": int(number)}
        for edge, top, number in zip(edges, tops, sums, strict=True)
    ]


def _round_width(least: float, is_whole: bool) -> float:
    """Return the least width of 1, 2 or 5 times a power of ten that is at least `least`."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    return max(1.0, width) if is_whole else width


def _plain(value: float) -> float | int:
    """Return a whole number as int, others rounded."""
    number = round(float(value), DIGITS)
    return int(number) if number == int(number) else number
