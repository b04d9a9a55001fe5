"""Read ahead and write behind in separate threads, with bounded queues in between.

The work in between (stages with their networks) stays in the calling thread, where an error in any thread
is raised after it ends all of them.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")

QUEUE_SIZE = 2  # items that wait in a queue
POLL_SECONDS = 0.2  # seconds between checks for Ctrl-C while waiting, which Windows needs
LAST_WAIT = 3.0  # seconds that a writer gets to finish after Ctrl-C if it has received all items


class QueueClosed(Exception):
    """The reader of a queue has stopped, so nothing can be added."""


class StreamStopped(Exception):
    """Tells a writer that the run has failed, so that it removes its incomplete output."""


class BoundedQueue(Generic[T]):
    """Queue between two threads, either of which can end it; no reference to a taken item remains."""

    def __init__(self, max_items: int = QUEUE_SIZE) -> None:
        self._max_items = max_items
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._is_ended = self._is_closed = False
        self._error: BaseException | None = None

    def put(self, item: T) -> None:
        """Append an item; wait while the queue is full.

        Raises:
            QueueClosed: If the reader has stopped.
        """
        with self._changed:
            while len(self._items) >= self._max_items and not self._is_closed:
                self._changed.wait(POLL_SECONDS)
            if self._is_closed:
                raise QueueClosed
            self._items.append(item)
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Mark the end of the queue: the reader stops after the last waiting item, or raises `error`.

        Args:
            error: Error to raise in the reader, which then drops the waiting items.
        """
        with self._changed:
            if error is not None:
                self._items.clear()
                self._error = error
            self._is_ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """Stop reading: no more items are accepted, and waiting items are dropped."""
        with self._changed:
            self._items.clear()
            self._is_closed = True
            self._changed.notify_all()

    def __iter__(self) -> "BoundedQueue[T]":
        return self

    def __next__(self) -> T:
        with self._changed:
            while not self._items and not self._is_ended:
                self._changed.wait(POLL_SECONDS)
            if self._error is not None:
                raise self._error
            if not self._items:
                raise StopIteration
            self._changed.notify_all()
            return self._items.popleft()


@contextmanager
def read_in_thread(source: Iterable[T], max_items: int = QUEUE_SIZE) -> Iterator[Iterator[T]]:
    """Yield an iterator over `source`, which a thread reads ahead; it also raises the errors of `source`.

    At most `max_items` items wait, and one more is being processed by the thread. When the `with` block has
    ended, so has the thread, and `source` is closed if it is a generator.
    """
    queue: BoundedQueue[T] = BoundedQueue(max_items)

    def read() -> None:
        try:
            for item in source:
                queue.put(item)
                del item  # else it would stay alive until the next one is read
            queue.end()
        except QueueClosed:
            pass  # the consumer has stopped
        except BaseException as error:  # raised again where items are taken
            queue.end(error)
        finally:
            close = getattr(source, "close", None)  # of a generator: its files are closed in this thread
            if close is not None:
                close()

    thread = threading.Thread(target=read, name="reading ahead", daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        queue.close()
        _join_thread(thread)


@contextmanager
def write_in_thread(
    write: Callable[[Iterator[T]], object], last_wait: float = LAST_WAIT
) -> Iterator[Callable[[T], None]]:
    """Yield a function that passes items to `write`, which consumes them in a thread as an iterator.

    At most QUEUE_SIZE items wait. When the block ends, `write` has returned. Its errors are raised by the
    function or at the end of the block. If the block fails, the iterator raises StreamStopped, so that
    `write` can remove its output.

    Args:
        write: Function to call in the thread.
        last_wait: Seconds that `write` gets to finish if Ctrl-C comes after it has received all items.
    """
    writer = _WriterThread(write)
    try:
        yield writer.put
    except BaseException:
        writer.abort()
        raise
    writer.finish(last_wait)


class _WriterThread(Generic[T]):
    """A running thread in which `write` consumes the items of a queue."""

    def __init__(self, write: Callable[[Iterator[T]], object]) -> None:
        self._queue: BoundedQueue[T] = BoundedQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(write,), name="writing behind", daemon=True)
        self._thread.start()

    def _run(self, write: Callable[[Iterator[T]], object]) -> None:
        try:
            write(self._queue)
        except BaseException as error:  # raised again by `put` or `finish`
            self._error = error
        finally:
            self._queue.close()

    def put(self, item: T) -> None:
        """Pass an item to the writer; raise the writer's error if it has failed."""
        try:
            self._queue.put(item)
        except QueueClosed:
            _join_thread(self._thread)
            raise (self._error or RuntimeError("the writer ended before its items did")) from None

    def abort(self, seconds: float | None = None) -> None:
        """Raise StreamStopped in the writer, and wait for it, for at most `seconds` if a number is given."""
        self._queue.end(StreamStopped())
        _join_thread(self._thread, seconds)

    def finish(self, last_wait: float) -> None:
        """End the queue, and wait for the writer; raise its error. On Ctrl-C, abort after `last_wait`."""
        self._queue.end()
        try:
            _join_thread(self._thread)
        except BaseException:  # Ctrl-C
            self.abort(last_wait)
            raise
        if self._error is not None:
            raise self._error


def _join_thread(thread: threading.Thread, seconds: float | None = None) -> None:
    """Wait until a thread has ended, for at most `seconds` if a number is given."""
    waited = 0.0
    while thread.is_alive() and (seconds is None or waited < seconds):
        thread.join(POLL_SECONDS)
        waited += POLL_SECONDS
