"""Write previews in a thread of their own, so that the next step does not wait for an encoder."""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class LatestWriter(Generic[Item]):
    """Call `write` with the items that are put, one at a time; a newer one replaces one that waits.

    The thread is started by the first item. `write` must not raise. rest: seconds of rest after an item for
    each second that it took, where the thread takes time from the work that it shows.
    """

    def __init__(self, write: Callable[[Item], None], rest: float = 0.0) -> None:
        self._write, self._rest = write, rest
        self._waiting: Item | None = None
        self._is_ending = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, item: Item) -> None:
        """Have an item written soon, unless a newer one comes before; returns at once."""
        with self._changed:
            self._waiting = item
            self._changed.notify()
        if self._thread is None:
            # daemon: a second Ctrl-C ends the program even if a disk does not answer
            self._thread = threading.Thread(target=self._run, name="latent preview", daemon=True)
            self._thread.start()

    def close(self, drop: bool = False) -> None:
        """Write the item that waits, without rest, or drop it; then end the thread."""
        with self._changed:
            self._is_ending = True
            if drop:
                self._waiting = None
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_ending or self._waiting is not None)
                item, self._waiting = self._waiting, None
            if item is None:
                return
            start = time.monotonic()
            self._write(item)
            del item  # frees its memory
            took = time.monotonic() - start
            with self._changed:
                self._changed.wait_for(lambda: self._is_ending, timeout=self._rest * took)
