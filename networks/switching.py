"""Put other LoRAs into a model that is loaded, with the numbers that loading it with them would give."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from networks.merge import LoraPatch, LoraUse

_CPU, _META = torch.device("cpu"), torch.device("meta")


class OriginalWeights:
    """Weights of a model as its file has them, of all modules that some LoRAs change; a `WeightPatch`.

    Load the model with this as `Placement.patch`; then `switch` adds LoRAs to the originals, in the same
    dtype, on the same device and in the same order as loading does, so that the weights are equal to the bit.
    The originals are kept in host memory. Not for weights in 8 bits or swapped ones.
    """

    def __init__(self, uses: Sequence[LoraUse], published: Callable[[str], str] = str) -> None:
        """uses: all that may be switched to, for their names and sizes.

        published: name of a parameter of the network -> the one in files.
        """
        self._all = LoraPatch(uses)
        self._published = published
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """Keep a copy of the weight if a LoRA changes it, and return the weight as it is.

        Raises CheckpointError if a LoRA has another size.
        """
        published = self._published(name)
        self._all(published, torch.empty(weight.shape, dtype=weight.dtype, device=_META))
        if self._all.touches(published):
            self._kept[name] = weight.detach().to(_CPU, copy=True)
        return weight

    def keep(self, network: nn.Module) -> None:
        """Do the same for all parameters of a network that is loaded."""
        for name, parameter in network.named_parameters():
            self(name, parameter)

    def check(self) -> None:
        """Warn of parts of LoRAs without a weight; raise CheckpointError if a LoRA has none at all."""
        self._all.check()

    @torch.no_grad()
    def switch(self, network: nn.Module, uses: Sequence[LoraUse]) -> None:
        """Give the loaded network its original weights with these LoRAs added; none: as loaded."""
        patch = LoraPatch(uses)
        parameters = dict(network.named_parameters())
        for name, original in self._kept.items():
            parameter = parameters[name]
            parameter.copy_(patch(self._published(name), original.to(parameter.device)))
