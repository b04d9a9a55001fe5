"""Progress bars in one style, for loops that may take longer than a second.

On a terminal a bar appears after a second. Anywhere else (a file, a pipe) a log line is written now and then
instead. Boxes, log lines and bars share standard error.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from modules.console import format_duration, format_size
from modules.control_codes import escape_control_codes
from modules.installation import PROGRESS

logger = logging.getLogger(__name__)

T = TypeVar("T")
STEPS = "step"
BYTES = "B"
FRAMES = "frame"
STEPS_FORMAT = "{desc}, step {n_fmt} of {total_fmt}: |{bar}| [{elapsed}<{remaining}]"
DELAY = 1.0  # seconds until a bar appears
LINE_INTERVAL = 30.0  # seconds between log lines if no bar can be shown


class Bar(ExitStack):
    """Progress bar of a loop. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        total: float | None,
        what: str,
        unit: str = STEPS,
        shown: bool = True,
        shows_immediately: bool = False,
        now: Callable[[], float] = time.monotonic,
        is_terminal: Callable[[], bool] = lambda: sys.stderr.isatty(),
    ) -> None:
        """Start a progress bar.

        Args:
            total: Total amount of work; None if unknown.
            what: Description of the work.
            unit: Unit of the amounts.
            shown: Whether to show the progress at all.
            shows_immediately: Whether to show the bar now instead of after a second.
            now: Returns the time in seconds.
            is_terminal: Returns whether standard error is a terminal.
        """
        super().__init__()
        self.total, self.what, self.unit, self.now = total, escape_control_codes(what), unit, now
        self.shown = shown and logger.isEnabledFor(logging.INFO)  # other processes log nothing
        self.is_terminal = is_terminal
        self.done: float = 0
        self._bar: Any = None
        # reports done, total and unit to the program that started this one
        self._report: Callable[[float, float | None, str], None] | None = None
        if os.environ.get(PROGRESS):
            from modules.progress import ProgressFile  # only if another program reads it

            self._report = ProgressFile().note
        self._start = self._last_line = now()  # times of the beginning and of the last log line
        if shows_immediately and self.shown and is_terminal():
            self._open_bar()

    def update(self, amount: float = 1) -> None:
        """Add `amount` units of finished work, and update the display if it is due."""
        self.done += amount
        if not self.shown:
            return
        if self._report is not None:
            self._report(self.done, self.total, self.unit)
        if self._bar is not None:
            self._bar.update(amount)
        elif not self.is_terminal():
            if self.now() - self._last_line >= LINE_INTERVAL:
                self._last_line = self.now()
                logger.info("%s", self.line())
        elif self.now() - self._start >= DELAY:
            # opened only now, because a log line would redraw a bar that is not due yet
            self._open_bar()

    def _open_bar(self) -> None:
        """Open a tqdm bar that starts with the work done so far."""
        self.enter_context(logging_redirect_tqdm())  # write log lines above the bar
        bar = tqdm(
            total=self.total,
            desc=self.what,
            unit=self.unit,
            unit_scale=self.unit == BYTES,
            dynamic_ncols=True,
            leave=False,
            bar_format=STEPS_FORMAT if self.unit == STEPS and self.total is not None else None,
        )
        self._bar = self.enter_context(bar)
        bar.start_t -= self.now() - self._start  # the work began before the bar was opened
        bar.update(self.done)
        bar.refresh()

    def line(self) -> str:
        """Describe the progress, with an estimate of the remaining time and, for frames, the rate."""
        elapsed = self.now() - self._start
        format_amount = format_size if self.unit == BYTES else "{:g}".format
        progress = format_amount(self.done)
        if self.total is not None:
            progress += f" of {format_amount(self.total)}"
        details = [progress]
        if self.unit == FRAMES and self.done and elapsed > 0:
            details.append(f"{self.done / elapsed:.3g} frames a second")
        if self.total is not None and self.done:
            seconds_left = elapsed * max(0, self.total - self.done) / self.done
            details.append(f"about {format_duration(seconds_left)} left")
        separator = ", step " if self.unit == STEPS else ": "
        return f"{self.what}{separator}{', '.join(details)}"


def track(
    items: Iterable[T],
    what: str,
    total: float,
    size: Callable[[T], float] = lambda _: 1,
    unit: str = STEPS,
    shown: bool = True,
) -> Iterator[T]:
    """Yield the items and show a progress bar.

    `size` returns how much of `total` an item stands for.
    """
    with Bar(total, what, unit, shown) as bar:
        for item in items:
            amount = size(item)
            yield item
            del item  # the consumer may have freed it
            bar.update(amount)
