"""Time the steps of a run and its pauses (samples, validations, saves), and estimate the remaining time."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from training.reports.history import SHOWN

SAMPLES, VALIDATION, SAVING = "samples", "validation", "saving"
# when slow steps are reported
SEEN = 10  # number of steps before the median is used
KEPT = 200  # the median is taken over the last steps only, because a run may change its speed
LEAST = 1.0  # faster steps, in seconds, are not reported
FACTOR = 2.0  # report steps slower than the median by this factor
PAUSE = 50  # minimum number of steps between two reports

CAUSES = (
    "Usual causes: reading caches (a slow disk, few "
    "--max_data_loader_n_workers); another program on the GPU; a GPU that is too hot; memory that spills "
    "over."
)


@dataclass
class StepClock:
    """Measure the duration of steps and pauses, and find steps slower than others with equal item sizes.

    If `skips` is set, the next step is not compared. The remaining time counts only kinds of pauses that
    have occurred.
    """

    to_come: Callable[[int], dict[str, int]] = lambda step: {}  # pauses after a step by kind
    now: Callable[[], float] = time.monotonic  # seconds
    pauses: dict[str, list[float]] = field(default_factory=dict, init=False)
    active: float = field(default=0.0, init=False)  # seconds of all steps so far, without pauses
    steps: int = field(default=0, init=False)
    seconds_per_step: float | None = field(default=None, init=False)  # mean of the last steps
    skips: bool = field(default=True, init=False)  # the first step compiles, chooses kernels, fills caches
    _last: deque[float] = field(default_factory=lambda: deque(maxlen=SHOWN), init=False)
    _times: dict[Hashable, deque[float]] = field(default_factory=dict, init=False)  # by the sizes of items
    _last_warned: int | None = field(default=None, init=False)

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Time the block as a pause of this kind."""
        start = self.now()
        yield
        self.pauses.setdefault(kind, []).append(self.now() - start)

    def left(self, step: int, total_steps: int) -> float | None:
        """Return the remaining seconds after a step; None before the first step.

        Future pauses are included, each with the mean of its kind.
        """
        if self.seconds_per_step is None:
            return None
        to_come = self.to_come(step) if self.pauses else {}
        pauses = (sum(all) / len(all) * to_come.get(kind, 0) for kind, all in self.pauses.items())
        return self.seconds_per_step * (total_steps - step) + sum(pauses)

    def note(self, step: int, seconds: float, sizes: Hashable = None) -> str | None:
        """Record the time of a step.

        Args:
            step: Number of the optimizer step.
            seconds: Duration of the step.
            sizes: Sizes of the items; steps with equal sizes take equally long.

        Returns:
            A warning if the step took more than twice the median of similar steps.
        """
        self.active += seconds
        self.steps += 1
        self._last.append(seconds)
        self.seconds_per_step = sum(self._last) / len(self._last)
        if self.skips:  # this step is known to be slow: it is neither compared nor remembered
            self.skips = False
            return None
        earlier_times = self._times.setdefault(sizes, deque(maxlen=KEPT))
        median = statistics.median(earlier_times) if len(earlier_times) >= SEEN else None
        earlier_times.append(seconds)
        if median is None or seconds < LEAST or seconds <= FACTOR * median:
            return None
        if self._last_warned is not None and step - self._last_warned < PAUSE:  # not too many warnings
            return None
        self._last_warned = step
        return (
            f"Step {step} took {seconds:.2f} s; {median:.2f} s are usual for steps with items of this size. "
            f"{CAUSES}"
        )
