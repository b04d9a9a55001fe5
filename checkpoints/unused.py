"""Tensors of a transformer file that its network does not use; fine-tuned files contain them again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from checkpoints.opening import Checkpoint
from protocols.loading import TensorInfo, TensorSource


@dataclass(frozen=True)
class UnusedTensors:
    """Tensors of a transformer file that our network does not use, by their published names.

    Full fine-tuning copies them to its output, so that it contains the same tensors as the source file.
    """

    sources: Mapping[str, TensorSource]
    open: Callable[[], Checkpoint]  # opens the file again

    def opened(self) -> "OpenedTensors":
        """Open the file and return its unused tensors, with dtypes and shapes as in the published model."""
        checkpoint = self.open()
        infos = {}
        for name, source in self.sources.items():
            # made on the meta device, to learn its dtype and shape without reading the file
            tensor = source.build_tensor([checkpoint.tensors[stored].hollow() for stored in source.names])
            infos[name] = TensorInfo(tensor.dtype, tuple(tensor.shape))
        return OpenedTensors(self.sources, checkpoint, infos)


@dataclass(frozen=True, eq=False)
class OpenedTensors:
    """Unused tensors of a transformer file, which is kept open so that they can still be copied later."""

    sources: Mapping[str, TensorSource]
    checkpoint: Checkpoint
    infos: Mapping[str, TensorInfo]

    def read(self, name: str) -> Tensor:
        """Read a tensor of the file by its published name."""
        source = self.sources[name]
        return source.build_tensor([self.checkpoint.read(stored) for stored in source.names])
