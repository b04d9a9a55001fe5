"""Threads that read ahead and write behind: bounded, in order, and ended by an error anywhere."""

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from post.streaming import read_ahead, write_behind


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name in {"reading ahead", "writing behind"}]


def test_reading_ends_and_closes_its_file_when_nobody_reads() -> None:
    closed: list[str] = []

    def source() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(threading.current_thread().name)

    with read_ahead(source()) as items:
        assert next(items) == 1

    assert closed == ["reading ahead"]
    assert not threads()


def test_an_error_of_writing_ends_the_run_with_it_and_does_not_wait_for_ever() -> None:
    def write(items: Iterator[int]) -> None:
        next(items)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"), write_behind(write) as put:
        all(put(number) is None for number in range(100))

    assert not threads()


def test_an_error_of_writing_at_the_very_end_is_raised_too() -> None:
    def write(items: Iterator[int]) -> None:
        assert list(items) == [1]
        raise OSError("no room for the index")

    with pytest.raises(OSError, match="no room"), write_behind(write) as put:
        put(1)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals of POSIX")
def test_ctrl_c_while_the_last_is_written_does_not_wait_for_ever() -> None:
    is_over = threading.Event()

    def write(items: Iterator[int]) -> None:
        list(items)
        is_over.wait(30)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    started = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt), write_behind(write, last_wait=0.2) as put:
            put(1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    assert time.monotonic() - started < 10
    assert threads() == ["writing behind"]  # it dies with the program
    is_over.set()
    while threads():
        time.sleep(0.01)
