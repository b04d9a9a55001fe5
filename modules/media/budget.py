"""Share a number of bytes among threads that decode: small files may hold pictures of a gigabyte.

Standard library only.
"""

import contextlib
import threading
from collections.abc import Iterator


class ByteBudget:
    """So many bytes for all threads together; one that needs more than all of them works alone."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._used = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, size_bytes: int) -> Iterator[None]:
        """Wait until this many bytes are free, and hold them until the block ends; blocks are not nested."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size_bytes <= self._size_bytes)
            self._used += size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= size_bytes
                self._changed.notify_all()
