"""Networks that are loaded when needed and freed by hand."""

import weakref

import pytest
import torch
from torch import nn

from modules.offload.host_memory import LoadedNetwork


def test_a_network_is_made_once_and_moves_from_then_on() -> None:
    held, made = LoadedNetwork[nn.Linear, str](), list[torch.device]()

    def make(device: torch.device) -> tuple[nn.Linear, str]:
        made.append(device)
        return nn.Linear(2, 2, device=device), "beside"

    held.load(torch.device("cpu"), make)
    first, beside = held.get()
    held.load(torch.device("meta"), make)

    assert made == [torch.device("cpu")]
    assert beside == "beside"
    assert held.get()[0] is first
    assert first.weight.device.type == "meta"


def test_a_freed_network_is_gone_and_may_be_loaded_again() -> None:
    held = LoadedNetwork[nn.Linear, None]()
    held.load(torch.device("cpu"), lambda device: (nn.Linear(2, 2), None))
    network = weakref.ref(held.get()[0])

    held.free()
    held.free()

    assert network() is None
    with pytest.raises(AssertionError, match="load"):
        held.get()
    held.load(torch.device("cpu"), lambda device: (nn.Linear(3, 3), None))
    assert held.get()[0].in_features == 3
