"""Time what interrupts the steps of a run (samples, validations, saves), and what of it is still to come."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SAMPLES, VALIDATION, SAVING = "samples", "validation", "saving"


@dataclass
class Pauses:
    """Hold the seconds of pauses so far by kind. A kind that has not been seen counts nothing yet."""

    to_come: Callable[[int], dict[str, int]] = lambda step: {}  # pauses after a step by kind
    now: Callable[[], float] = time.monotonic  # seconds
    seconds: dict[str, list[float]] = field(default_factory=dict, init=False)

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds.setdefault(kind, []).append(self.now() - start)

    def left(self, step: int) -> float:
        """Return the seconds of pauses after a step: the mean of each kind so far for each that comes."""
        to_come = self.to_come(step) if self.seconds else {}
        return sum(sum(all) / len(all) * to_come.get(kind, 0) for kind, all in self.seconds.items())
