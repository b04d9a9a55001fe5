"""Measure how long steps take and report suspiciously slow ones."""

import statistics
from dataclasses import dataclass, field

SEEN = 10  # steps before a median means something
KEPT = 200  # steps that the median is taken over: a run changes, for example with its buckets
FACTOR = 2.0  # report steps slower than the median by this factor
PAUSE = 50  # steps between two lines

CAUSES = (
    "Usual causes: a larger bucket than the others; reading caches (a slow disk, few "
    "--max_data_loader_n_workers); another program on the GPU; a GPU that is too hot; memory that spills "
    "over."
)


@dataclass
class StepClock:
    """Judge the times of steps.

    Steps with saving, sampling or validation between them do not count: call `skip` after those.
    """

    _times: list[float] = field(default_factory=list)
    _last_told: int | None = None
    _skips: bool = True  # the first step compiles, chooses kernels, fills caches

    def skip(self) -> None:
        """Ignore the next time to be noted."""
        self._skips = True

    def note(self, step: int, seconds: float) -> str | None:
        """Note the time of a step. Returns a warning if it was more than twice the run's median so far."""
        if self._skips:
            self._skips = False
            return None
        usual = statistics.median(self._times) if len(self._times) >= SEEN else None
        self._times = [*self._times[1 - KEPT :], seconds]
        if usual is None or seconds <= FACTOR * usual:
            return None
        if self._last_told is not None and step - self._last_told < PAUSE:
            return None
        self._last_told = step
        return (
            f"Step {step} took {seconds:.2f} s, {seconds / usual:.1f} times this run's median of {usual:.2f} "
            f"s. {CAUSES}"
        )
