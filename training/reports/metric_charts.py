"""How the page of a run shows additional values of its steps: as curves, and as tiles at its top.

A run records this in its history, so that the code of the page need not know the features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_SHOWN = 20  # maximum number of charts, and of tiles


@dataclass(frozen=True)
class MetricChart:
    """A chart of metrics on a run's page: its title, unit and curves."""

    title: str
    unit: str  # unit of the values
    curves: Mapping[str, str]  # title of a curve -> name of its value in the history

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "MetricChart":
        """Parse a chart from a history. Raises TypeError, AttributeError or LookupError if malformed."""
        curves = {str(label): str(name) for label, name in facts["curves"].items()}
        return cls(str(facts["title"]), str(facts["unit"]), curves)


@dataclass(frozen=True)
class MetricTile:
    """A tile at the top of the page: the mean of a metric over the latest steps, as a percentage."""

    title: str
    number: str  # name of the value in the history
    note: str  # first part of the note; the number of averaged steps follows

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "MetricTile":
        """Parse a tile from a history. Raises TypeError or LookupError if malformed."""
        return cls(str(facts["title"]), str(facts["number"]), str(facts["note"]))


def find_uncharted(names: Sequence[str], charts: Sequence[MetricChart]) -> list[MetricChart]:
    """Return charts for metrics that no chart shows; metrics named `group/label` share a chart per group."""
    charted = {name for chart in charts for name in chart.curves.values()}
    curves: dict[str, dict[str, str]] = {}
    for name in names:
        if name not in charted:
            group, _, label = name.rpartition("/")
            curves.setdefault(group or label, {})[label] = name
    return [MetricChart(group, "", of_group) for group, of_group in curves.items()]
