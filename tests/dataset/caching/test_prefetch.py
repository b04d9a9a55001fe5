import time

from dataset.caching.prefetch import WriteBehind, run_ahead


def test_results_come_in_order_whatever_finishes_first() -> None:
    def work(number: int) -> int:
        time.sleep(0.02 if number == 0 else 0)
        return number * 10

    assert list(run_ahead(range(6), work, 3, lambda _: 0, 1)) == [
        (number, number * 10) for number in range(6)
    ]


def test_no_more_is_started_than_the_limit_allows() -> None:
    started: list[int] = []

    def work(number: int) -> int:
        started.append(number)
        return number

    ahead = run_ahead(range(8), work, 4, lambda _: 10, limit_bytes=25)
    next(ahead)
    time.sleep(0.05)
    assert len(started) == 2  # 20 bytes; the first is not given back yet
    next(ahead)
    time.sleep(0.05)
    assert len(started) == 3
    ahead.close()


def test_writes_happen_in_order_and_are_finished_at_the_end() -> None:
    written: list[int] = []
    with WriteBehind() as writer:
        for number in range(20):
            writer.submit(lambda number=number: written.append(number))  # type: ignore[misc]
    assert written == list(range(20))
