"""The networks of a run by expert: most models have one; those of others may take turns on the device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from modules.offload.turns import HostCopy

DitOf = Callable[[int], nn.Module]  # index of an expert -> its network, ready to be called


@dataclass(frozen=True)
class Turns:
    """Networks of which one is on the device, while the others wait in host memory."""

    copies: Mapping[nn.Module, HostCopy]

    def bring(self, network: nn.Module) -> None:
        """Put a network on the device, in the place of the one that is there. Nothing is copied back."""
        copy = self.copies[network]
        if copy.is_here:
            return
        for other in self.copies.values():
            other.leave()
        copy.bring()


@dataclass(frozen=True)
class ExpertNetworks:
    """Networks by the index of their expert. `turns`: None if all of them stay on the device."""

    networks: Sequence[nn.Module]
    turns: Turns | None = None

    def at(self, expert: int) -> nn.Module:
        """Return the network of an expert; it is on the device."""
        network = self.networks[expert]
        if self.turns is not None:
            self.turns.bring(network)
        return network
