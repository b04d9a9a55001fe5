"""End a run after its current step on Ctrl-C or SIGTERM; a second signal ends it at once."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """Hold whether the run has been asked to end."""

    asked: bool = False
    agreed: bool = False  # all processes know of it

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Treat SIGINT and SIGTERM as requests to end. Does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.asked = True
        logger.warning(
            "Ending after this step; everything will be saved. Press Ctrl-C again to end at once and go back "
            "to the last saved state."
        )
