"""Keep a curve of any number of steps in bounded memory: mean, lowest and highest value of equal ranges."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

MOST_BINS = 600  # more than a drawing has pixels to tell apart


@dataclass
class StepBin:
    """Hold the values of a range of steps."""

    count: int
    first: int  # step
    last: int
    total: float
    lowest: float
    highest: float

    def join(self, other: "StepBin") -> None:
        """Take the values of the next bin too."""
        self.count, self.total = self.count + other.count, self.total + other.total
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)
        self.lowest, self.highest = min(self.lowest, other.lowest), max(self.highest, other.highest)

    @property
    def step(self) -> float:
        """Return the middle of the range."""
        return (self.first + self.last) / 2

    @property
    def mean(self) -> float:
        return self.total / self.count


@dataclass
class BinnedCurve:
    """Hold a curve over steps. The ranges double whenever there would be more than MOST_BINS of them."""

    width: int = 1  # steps of a range
    left_out: int = 0  # values that were NaN or infinite
    _bins: dict[int, StepBin] = field(default_factory=dict)

    def add(self, step: int, value: float | None) -> None:
        """Add the value of a step; None, NaN and infinite values are only counted."""
        if value is None or not math.isfinite(value):
            self.left_out += 1
            return
        while step // self.width >= MOST_BINS:
            self._double()
        self._put(step // self.width, StepBin(1, step, step, value, value, value))

    def __iter__(self) -> Iterator[StepBin]:
        """Yield the ranges that have values, by step."""
        return (self._bins[index] for index in sorted(self._bins))

    def __len__(self) -> int:
        return len(self._bins)

    @property
    def mean(self) -> float | None:
        """Return the mean of all values."""
        count = sum(each.count for each in self._bins.values())
        return sum(each.total for each in self._bins.values()) / count if count else None

    def _double(self) -> None:
        self.width *= 2
        bins, self._bins = self._bins, {}
        for index in sorted(bins):
            self._put(index // 2, bins[index])

    def _put(self, index: int, values: StepBin) -> None:
        if index in self._bins:
            self._bins[index].join(values)
        else:
            self._bins[index] = values
