"""Keep how long a run has trained and how fast it trains."""

from collections import deque
from dataclasses import dataclass, field

KEPT = 50  # steps whose mean is shown


@dataclass
class Pace:
    """Sum the seconds of the steps, without pauses, and average those of the last ones."""

    active: float = field(default=0.0, init=False)  # seconds of all steps so far
    steps: int = field(default=0, init=False)
    _last: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT), init=False)

    def note(self, seconds: float) -> None:
        """Note that a step is done."""
        self.active += seconds
        self.steps += 1
        self._last.append(seconds)

    @property
    def seconds_per_step(self) -> float | None:
        """Return the mean seconds of the last steps; None before the first."""
        return sum(self._last) / len(self._last) if self._last else None
