"""Read ahead and write behind in separate threads, with bounded queues in between.

The work in between (stages with their networks) stays in the thread that calls. An error in any thread ends
all of them and is raised there.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")

DEPTH = 2  # items that wait in a queue
PAUSE = 0.2  # seconds between checks for Ctrl-C while waiting, which Windows needs
LAST_WAIT = 3.0  # seconds that a writer gets to finish after Ctrl-C if it has received all items


class Closed(Exception):
    """The reader of a queue has stopped, so nothing can be added."""


class StreamStopped(Exception):
    """Tells a writer that the run has failed, so that it removes its incomplete output."""


class Pipe(Generic[T]):
    """Queue between two threads, either of which can end it; no reference to a taken item remains."""

    def __init__(self, depth: int = DEPTH) -> None:
        self._depth = depth
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._is_ended = self._is_closed = False
        self._error: BaseException | None = None

    def put(self, item: T) -> None:
        """Append an item; wait while the queue is full.

        Raises:
            Closed: If the reader has stopped.
        """
        with self._changed:
            while len(self._items) >= self._depth and not self._is_closed:
                self._changed.wait(PAUSE)
            if self._is_closed:
                raise Closed
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

    def __iter__(self) -> "Pipe[T]":
        return self

    def __next__(self) -> T:
        with self._changed:
            while not self._items and not self._is_ended:
                self._changed.wait(PAUSE)
            if self._error is not None:
                raise self._error
            if not self._items:
                raise StopIteration
            self._changed.notify_all()
            return self._items.popleft()


@contextmanager
def read_ahead(source: Iterable[T], depth: int = DEPTH) -> Iterator[Iterator[T]]:
    """Yield an iterator over `source`, which a thread reads ahead; it also raises the errors of `source`.

    At most `depth` items wait, and one more is being processed by the thread. When the `with` block has
    ended, so has the thread, and `source` is closed if it is a generator.
    """
    pipe: Pipe[T] = Pipe(depth)

    def read() -> None:
        try:
            for item in source:
                pipe.put(item)
                del item  # else it would stay alive until the next one is read
            pipe.end()
        except Closed:
            pass  # the consumer has stopped
        except BaseException as error:  # raised again where items are taken
            pipe.end(error)
        finally:
            close = getattr(source, "close", None)  # of a generator: its files are closed in this thread
            if close is not None:
                close()

    thread = threading.Thread(target=read, name="reading ahead", daemon=True)
    thread.start()
    try:
        yield pipe
    finally:
        pipe.close()
        _join_thread(thread)


@contextmanager
def write_behind(
    write: Callable[[Iterator[T]], object], last_wait: float = LAST_WAIT
) -> Iterator[Callable[[T], None]]:
    """Yield a function that passes items to `write`, which consumes them in a thread as an iterator.

    At most DEPTH items wait. When the block ends, `write` has returned. Its errors are raised by the function
    or at the end of the block. If the block fails, the iterator raises StreamStopped, so that `write` can
    remove its output.

    Args:
        write: Function to call in the thread.
        last_wait: Seconds that `write` gets to finish if Ctrl-C comes after it has received all items.
    """
    pipe: Pipe[T] = Pipe()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            write(pipe)
        except BaseException as error:  # raised again by `put` or at the end
            errors.append(error)
        finally:
            pipe.close()

    thread = threading.Thread(target=run, name="writing behind", daemon=True)
    thread.start()

    def put(item: T) -> None:
        """Pass an item to the writer; raise the writer's error if it has failed."""
        try:
            pipe.put(item)
        except Closed:
            _join_thread(thread)
            raise (errors[0] if errors else RuntimeError("the writer ended before its items did")) from None

    try:
        yield put
    except BaseException:
        pipe.end(StreamStopped())
        _join_thread(thread)
        raise
    pipe.end()
    try:
        _join_thread(thread)
    except BaseException:  # Ctrl-C
        pipe.end(StreamStopped())
        _join_thread(thread, last_wait)
        raise
    if errors:
        raise errors[0]


def _join_thread(thread: threading.Thread, seconds: float | None = None) -> None:
    waited = 0.0
    while thread.is_alive() and (seconds is None or waited < seconds):
        thread.join(PAUSE)
        waited += PAUSE
