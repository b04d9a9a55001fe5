"""Make something in a thread while other work goes on."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

PAUSE = 0.2  # seconds after which waiting looks whether someone pressed Ctrl-C, which Windows needs

Check = Callable[[], None]  # called now and then by what is made; raises `ReadingStopped` if nobody wants it


class ReadingStopped(Exception):
    """Nobody wants what is being made."""


class Ahead(Generic[T]):
    """Something that is being made in a thread, from now on."""

    def __init__(self, make: Callable[[Check], T]) -> None:
        """make: returns it, without gradients. What it computes on a GPU wants a stream of its own."""
        self._make = make
        self._made: list[T] = []
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loading ahead", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Return whether it is made, or has failed."""
        return not self._thread.is_alive()

    def take(self) -> T:
        """Wait until it is made, and return it: once. Raises what making it has raised."""
        self._join()
        if self._error is not None:
            raise self._error
        return self._made.pop()

    def cancel(self) -> None:
        """Have it end soon, wait for that, and free what was made."""
        self._stop.set()
        self._join()
        self._made.clear()
        self._error = None

    def _join(self) -> None:
        while self._thread.is_alive():
            self._thread.join(PAUSE)

    def _check(self) -> None:
        if self._stop.is_set():
            raise ReadingStopped

    def _run(self) -> None:
        try:
            with torch.no_grad():  # holds for a single thread
                self._made.append(self._make(self._check))
        except BaseException as error:  # raised again by `take`
            self._error = error
