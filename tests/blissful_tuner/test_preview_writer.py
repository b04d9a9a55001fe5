"""The thread that writes previews: the newest one counts, and the steps do not wait."""

import threading

from blissful_tuner.latent_preview import LatestWriter

SOON = 30.0  # seconds that a test would wait for what should happen at once


def test_a_newer_item_replaces_one_that_waits() -> None:
    written: list[int] = []
    began, may_go_on = threading.Event(), threading.Event()

    def write(item: int) -> None:
        written.append(item)
        began.set()
        assert may_go_on.wait(SOON)

    writer = LatestWriter(write)
    writer.put(1)
    assert began.wait(SOON)
    for item in (2, 3, 4):  # returns though the first is still being written
        writer.put(item)
    may_go_on.set()
    writer.close()

    assert written == [1, 4]
