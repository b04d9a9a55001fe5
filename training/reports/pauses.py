"""Time the steps of a run and its pauses (samples, validations, saves), and estimate the remaining time."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from training.reports.history import SHOWN

SAMPLES, VALIDATION, SAVING = "samples", "validation", "saving"
MEASURING = "measuring items"
# when slow steps are reported
MIN_STEPS = 10  # number of steps before the median is used
MAX_STEPS = 200  # the median is taken over the last steps only, because a run may change its speed
MIN_SECONDS = 1.0  # faster steps, in seconds, are not reported
SLOW_FACTOR = 2.0  # report steps slower than the median by this factor
STEPS_BETWEEN_WARNINGS = 50  # minimum number of steps between two reports

CAUSES = (
    "Usual causes: reading caches (a slow disk, few "
    "--max_data_loader_n_workers); another program on the GPU; a GPU that is too hot; memory that spills "
    "over."
)


@dataclass
class StepClock:
    """Measure the duration of steps and pauses, and find steps slower than others with equal item sizes.

    If `skips_next_step` is set, the next step is not compared. The remaining time includes only kinds of
    pauses that have occurred before.
    """

    count_future_pauses: Callable[[int], dict[str, int]] = lambda step: {}  # pauses after a step by kind
    now: Callable[[], float] = time.monotonic  # seconds
    pauses: dict[str, list[float]] = field(default_factory=dict, init=False)
    total_step_seconds: float = field(default=0.0, init=False)  # seconds of all steps so far, without pauses
    steps: int = field(default=0, init=False)
    seconds_per_step: float | None = field(default=None, init=False)  # mean of the last steps
    # the first step compiles, chooses kernels, fills caches
    skips_next_step: bool = field(default=True, init=False)
    _recent_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=SHOWN), init=False)
    # durations of earlier steps by the sizes of their items
    _seconds_by_sizes: dict[Hashable, deque[float]] = field(default_factory=dict, init=False)
    _last_warned: int | None = field(default=None, init=False)

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Time the block as a pause of this kind."""
        start = self.now()
        yield
        self.pauses.setdefault(kind, []).append(self.now() - start)

    def estimate_remaining(self, step: int, total_steps: int) -> float | None:
        """Return the estimated remaining seconds after a step; None before the first step.

        Future pauses are included, each with the mean duration of its kind.
        """
        if self.seconds_per_step is None:
            return None
        counts = self.count_future_pauses(step) if self.pauses else {}
        pause_seconds = []
        for kind, durations in self.pauses.items():
            pause_seconds.append(sum(durations) / len(durations) * counts.get(kind, 0))
        return self.seconds_per_step * (total_steps - step) + sum(pause_seconds)

    def record_step(self, step: int, seconds: float, sizes: Hashable = None) -> str | None:
        """Record the time of a step.

        Args:
            step: Number of the optimizer step.
            seconds: Duration of the step.
            sizes: Sizes of the items; steps with equal sizes take equally long.

        Returns:
            A warning if the step took more than twice the median of similar steps.
        """
        self.total_step_seconds += seconds
        self.steps += 1
        self._recent_seconds.append(seconds)
        self.seconds_per_step = sum(self._recent_seconds) / len(self._recent_seconds)
        if self.skips_next_step:  # this step is known to be slow: it is neither compared nor remembered
            self.skips_next_step = False
            return None
        earlier_seconds = self._seconds_by_sizes.setdefault(sizes, deque(maxlen=MAX_STEPS))
        median = statistics.median(earlier_seconds) if len(earlier_seconds) >= MIN_STEPS else None
        earlier_seconds.append(seconds)
        if median is None or seconds < MIN_SECONDS or seconds <= SLOW_FACTOR * median:
            return None
        if self._last_warned is not None and step - self._last_warned < STEPS_BETWEEN_WARNINGS:
            return None
        self._last_warned = step
        return (
            f"Step {step} took {seconds:.2f} s; {median:.2f} s are usual for steps with items of this size. "
            f"{CAUSES}"
        )
