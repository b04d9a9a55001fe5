"""Measure how fast training goes, without the pauses for samples, validation and saving."""

from collections import deque
from dataclasses import dataclass, field

KEPT = 100  # steps that the rate is taken over


@dataclass
class Pace:
    """Seconds of training so far, and the rate of the last steps. All times are seconds of one clock."""

    active: float = field(default=0.0, init=False)  # seconds of training, up to the last step or pause
    first_step: int | None = field(default=None, init=False)
    last_step: int = field(default=0, init=False)
    _since: float | None = field(default=None, init=False)  # None: paused
    _marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=KEPT), init=False)

    def resume(self, now: float) -> None:
        """Begin to train, or go on after a pause."""
        self._since = now

    def pause(self, now: float) -> None:
        """Stop counting until `resume`."""
        self._count(now)
        self._since = None

    def note(self, step: int, now: float) -> None:
        """Note that a step is done."""
        self._count(now)
        if self.first_step is None:
            self.first_step = step
        self.last_step = step
        self._marks.append((self.active, step))

    @property
    def seconds_per_step(self) -> float | None:
        """Return the mean seconds of the last steps; None before two are done."""
        if len(self._marks) < 2:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (end - start) / (last - first) if last > first and end > start else None

    def _count(self, now: float) -> None:
        if self._since is not None:
            self.active += now - self._since
            self._since = now
