"""Tell how fast a run trains, and which steps are suspiciously slow."""

import statistics
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

SEEN = 10  # steps before a median means something
KEPT = 200  # steps that the median is taken over: a run changes
SHOWN = 50  # steps whose mean seconds are shown
LEAST = 1.0  # seconds of a step that is worth a line
FACTOR = 2.0  # report steps slower than the median by this factor
PAUSE = 50  # steps between two lines

CAUSES = (
    "Usual causes: reading caches (a slow disk, few "
    "--max_data_loader_n_workers); another program on the GPU; a GPU that is too hot; memory that spills "
    "over."
)


@dataclass
class StepClock:
    """Judge the times of steps, each beside those with items of the same sizes.

    Steps with saving, sampling or validation between them do not count: call `skip` after those.
    """

    _times: dict[Hashable, deque[float]] = field(default_factory=dict)
    _last_told: int | None = None
    _skips: bool = True  # the first step compiles, chooses kernels, fills caches

    def skip(self) -> None:
        """Ignore the next time to be noted."""
        self._skips = True

    def note(self, step: int, seconds: float, sizes: Hashable = None) -> str | None:
        """Note the time of a step. Returns a warning if it was more than twice the median of its like.

        sizes: of the items; two steps that share them take as long.
        """
        if self._skips:
            self._skips = False
            return None
        times = self._times.setdefault(sizes, deque(maxlen=KEPT))
        usual = statistics.median(times) if len(times) >= SEEN else None
        times.append(seconds)
        if usual is None or seconds < LEAST or seconds <= FACTOR * usual:
            return None
        if self._last_told is not None and step - self._last_told < PAUSE:
            return None
        self._last_told = step
        return (
            f"Step {step} took {seconds:.2f} s; {usual:.2f} s are usual for steps with items of this size. "
            f"{CAUSES}"
        )


@dataclass
class Pace:
    """Sum the seconds of the steps, without pauses, and average those of the last ones."""

    active: float = field(default=0.0, init=False)  # seconds of all steps so far
    steps: int = field(default=0, init=False)
    _last: deque[float] = field(default_factory=lambda: deque(maxlen=SHOWN), init=False)

    def note(self, seconds: float) -> None:
        """Note that a step is done."""
        self.active += seconds
        self.steps += 1
        self._last.append(seconds)

    @property
    def seconds_per_step(self) -> float | None:
        """Return the mean seconds of the last steps; None before the first."""
        return sum(self._last) / len(self._last) if self._last else None
