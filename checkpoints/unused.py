"""Tensors of a transformer's file that its network does not have, and that a trained file has again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from checkpoints.opening import Checkpoint
from contract.loading import TensorInfo, TensorSource


@dataclass(frozen=True)
class UnusedTensors:
    """Tensors of a transformer's file that its network does not have, by their published names.

    A training of all weights writes them again, so that its file has the names of the source.
    """

    sources: Mapping[str, TensorSource]
    open: Callable[[], Checkpoint]  # opens the file again

    def opened(self) -> "OpenedTensors":
        """Open the file and return the tensors, with their dtypes and shapes in the published layout."""
        checkpoint = self.open()
        infos = {}
        for name, source in self.sources.items():
            hollow = source.make([checkpoint.tensors[stored].hollow() for stored in source.names])
            infos[name] = TensorInfo(hollow.dtype, tuple(hollow.shape))
        return OpenedTensors(self.sources, checkpoint, infos)


@dataclass(frozen=True, eq=False)
class OpenedTensors:
    """Unused tensors of a file that stays open, so that nobody can take it away."""

    sources: Mapping[str, TensorSource]
    checkpoint: Checkpoint
    infos: Mapping[str, TensorInfo]

    def read(self, name: str) -> Tensor:
        """Read a tensor by its published name."""
        source = self.sources[name]
        return source.make([self.checkpoint.read(stored) for stored in source.names])
