"""A network that is loaded when it is first needed, and freed when others need the memory."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import nn

from modules.devices import free_memory

Network = TypeVar("Network", bound=nn.Module)
Beside = TypeVar("Beside")


class LoadedNetwork(Generic[Network, Beside]):
    """A network and its companion, such as a tokenizer; both exist only between `load` and `free`."""

    def __init__(self) -> None:
        self._pair: tuple[Network, Beside] | None = None

    def load(self, device: torch.device, make: Callable[[torch.device], tuple[Network, Beside]]) -> None:
        """Make both, with the network on the device; or move a network that is already loaded."""
        if self._pair is None:
            self._pair = make(device)
        else:
            self._pair[0].to(device)

    def get(self) -> tuple[Network, Beside]:
        """Return both. Call `load` first."""
        assert self._pair is not None, "call load() first"
        return self._pair

    def free(self) -> None:
        """Free the memory of both."""
        if self._pair is not None:
            device = next(self._pair[0].parameters()).device
            self._pair = None
            free_memory(device)
