"""A network that is loaded when it is first asked for, and freed when others need the room."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import nn

from modules.devices import free_memory

Network = TypeVar("Network", bound=nn.Module)
Beside = TypeVar("Beside")


class Loaded(Generic[Network, Beside]):
    """A network and what goes with it, such as its tokenizer; neither is there before `load` and after
    `free`.
    """

    def __init__(self) -> None:
        self._pair: tuple[Network, Beside] | None = None

    def load(self, device: torch.device, make: Callable[[torch.device], tuple[Network, Beside]]) -> None:
        """Make both, the network on the device; or move the network that is there."""
        if self._pair is None:
            self._pair = make(device)
        else:
            self._pair[0].to(device)

    def get(self) -> tuple[Network, Beside]:
        """Both; `load` comes first."""
        assert self._pair is not None, "load() comes first"
        return self._pair

    def free(self) -> None:
        """Give the memory back."""
        if self._pair is not None:
            device = next(self._pair[0].parameters()).device
            self._pair = None
            free_memory(device)
