"""Which device a run gets, and what is sent there."""

from typing import Any

import pytest
import torch
from torch import Tensor

from modules.devices import IN_COMMAND, choose_device, empty_pinned, numbers_on, send_ahead
from modules.errors import OptionError


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine with two GPUs; which of them were made the current one."""
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    return made


def test_a_gpu_that_is_named_becomes_the_current_one(current: list[torch.device]) -> None:
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]


def test_a_launcher_chooses_the_current_gpu_where_none_is_named(current: list[torch.device]) -> None:
    assert choose_device(None) == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")
    assert current == []


def test_a_gpu_that_is_not_there_is_refused(current: list[torch.device]) -> None:
    with pytest.raises(OptionError, match="torch sees 2 CUDA devices, counted from cuda:0"):
        choose_device("cuda:2")
    assert current == []


def test_numbers_are_sent_in_rows_and_as_the_dtype_asked_for() -> None:
    device = torch.device("cpu")
    assert torch.equal(numbers_on(device, [[1, 1 << 40], [3, 4]]), torch.tensor([[1, 1 << 40], [3, 4]]))
    assert numbers_on(device, [True, False], torch.float32).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("refuses", [False, True])
def test_only_what_does_not_fit_a_command_is_pinned_before_it_is_sent_ahead(
    monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    log: list[tuple[str, int]] = []

    def pin(tensor: Tensor) -> Tensor:
        if refuses:
            raise RuntimeError("CUDA error: out of memory")
        log.append(("pin", tensor.nbytes))
        return tensor.clone()

    def to(tensor: Tensor, device: torch.device, **named: Any) -> Tensor:
        assert (device, named) == (torch.device("cuda"), {"non_blocking": True})
        log.append(("send", tensor.nbytes))
        return tensor

    monkeypatch.setattr(Tensor, "is_pinned", lambda _: False)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    small, large = torch.zeros(IN_COMMAND, dtype=torch.uint8), torch.ones(IN_COMMAND + 1, dtype=torch.uint8)

    assert send_ahead(small, torch.device("cuda")) is small
    assert torch.equal(send_ahead(large, torch.device("cuda")), large)

    pinned = [] if refuses else [("pin", large.nbytes)]
    assert log == [("send", small.nbytes), *pinned, ("send", large.nbytes)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's driver would lock the memory")
def test_memory_that_cannot_be_locked_serves_too() -> None:
    assert empty_pinned([2, 3], torch.float64).shape == (2, 3)
