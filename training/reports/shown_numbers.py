"""Say how the page of a run shows further numbers of its steps: as curves, and at its top.

A run notes this in its history, so that whoever shows the page need not know what recorded the numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_SHOWN = 20  # charts, and tiles, of a history


@dataclass(frozen=True)
class NumberChart:
    """A diagram of numbers."""

    title: str
    unit: str  # of the numbers
    curves: Mapping[str, str]  # what a curve is called -> the name of its number

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "NumberChart":
        """Read what a history has of one. Raises TypeError, AttributeError or LookupError."""
        curves = {str(label): str(name) for label, name in facts["curves"].items()}
        return cls(str(facts["title"]), str(facts["unit"]), curves)


@dataclass(frozen=True)
class NumberTile:
    """The mean of a number over the latest steps, as a percentage at the top of the page."""

    title: str
    number: str  # its name
    note: str  # in front of how many steps it is the mean of

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "NumberTile":
        """Parse the record of a chart in a history. Raises TypeError or LookupError."""
        return cls(str(facts["title"]), str(facts["number"]), str(facts["note"]))


def find_uncharted(names: Sequence[str], charts: Sequence[NumberChart]) -> list[NumberChart]:
    """Return diagrams of the numbers that no chart has, a diagram for each word in front of a /."""
    charted = {name for chart in charts for name in chart.curves.values()}
    curves: dict[str, dict[str, str]] = {}
    for name in names:
        if name not in charted:
            group, _, label = name.rpartition("/")
            curves.setdefault(group or label, {})[label] = name
    return [NumberChart(group, "", of_group) for group, of_group in curves.items()]
