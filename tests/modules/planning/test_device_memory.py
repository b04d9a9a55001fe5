from pathlib import Path

import pytest
import torch
from torch import nn

from modules.planning.device_memory import MemoryWatch, bytes_on, host_room, spills
from modules.planning.memory_plan import GIB


@pytest.mark.parametrize(
    ("free", "reserved", "expected"),
    [
        (0, 26 * GIB, True),  # more than the card has
        (GIB // 10, 24 * GIB - GIB // 2, True),  # nearly all of it, and nothing is free
        (2 * GIB, 21 * GIB, False),
        (2 * GIB, 24 * GIB - GIB // 2, False),  # cached, the driver has room
    ],
)
def test_what_a_card_cannot_hold_lies_in_host_memory(free: int, reserved: int, expected: bool) -> None:
    assert spills(24 * GIB, free, reserved) == expected


def test_the_bytes_of_a_network_are_those_on_that_device() -> None:
    network = nn.ModuleList([nn.Linear(3, 5), nn.Linear(7, 2, device="meta")])
    network.register_buffer("table", torch.zeros(4, dtype=torch.float16))
    assert bytes_on(network, torch.device("cpu")) == 4 * (3 * 5 + 5) + 2 * 4
    assert bytes_on(network, torch.device("meta")) == 4 * (7 * 2 + 2)


def test_the_room_of_the_host_is_what_linux_says_or_not_known(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(
        "MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:     2000 kB\n", encoding="ascii"
    )
    assert host_room(tmp_path / "meminfo") == 2000 * 1024
    assert host_room(tmp_path / "none") is None


class Counter:
    """CUDA's count of the most bytes so far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: self.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: self.take(0, anew=True))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 * GIB, 16 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 4 * GIB)

    def take(self, size: int, anew: bool = False) -> None:
        self.most = size if anew else max(self.most, size)


def test_the_peak_of_a_step_is_not_that_of_the_samples_before_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counter = Counter(monkeypatch)
    watch = MemoryWatch(torch.device("cuda"), predicted=4 * GIB, largest=100)

    def step(elements: int, size: int) -> None:
        counter.take(size)
        watch.see_batch(elements)
        watch.after_step()

    caplog.set_level("INFO")
    step(100, 6 * GIB)  # the first one makes the optimizer's states
    step(50, 3 * GIB)
    counter.take(9 * GIB)  # samples
    watch.after_pause()
    assert watch.measured is None
    step(100, 4 * GIB)
    assert watch.measured == 4 * GIB
    assert "predicted 4.00 GiB, measured 4.00 GiB" in caplog.text
    assert "please report" not in caplog.text

    counter.take(8 * GIB)
    watch.after_pause()
    assert watch.highest == 9 * GIB


def test_a_full_card_is_warned_of_once_with_numbers_and_remedies(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Counter(monkeypatch)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 17 * GIB)
    watch = MemoryWatch(torch.device("cuda"))
    watch.warn_if_full()
    watch.warn_if_full()
    assert caplog.text.count("reserved 17.00 of 16.00 GiB") == 1
    assert "--blocks_to_swap" in caplog.text
