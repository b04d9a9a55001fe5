"""What full fine-tuning requires of a family whose checkpoint contains more than the transformer.

Such a file also contains text encoders and a VAE. A run may train text encoders with the transformer, and
each file that it saves is a whole checkpoint again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeGuard

import torch
from torch import nn

from protocols.family import Described, Encodes


@dataclass(frozen=True)
class LearningParts:
    """Which parts of a checkpoint are trained, and their learning rates. A rate of 0 freezes a part."""

    # learning rates of text encoders by name; None: the shared rate
    text_encoder_rates: Mapping[str, float | None] = field(default_factory=dict)
    # learning rates of the transformer's blocks, numbered as in `DitSpec.block_numbering`; (): one for all
    blocks: tuple[float, ...] = ()
    text_steps: int | None = None  # number of steps in which text encoders learn; None: all

    def learns(self, text_encoder: str) -> bool:
        """Return whether a text encoder is trained: it has a learning rate, and training steps."""
        return self.text_encoder_rates.get(text_encoder, 0) != 0 and self.text_steps != 0

    @property
    def have_own_rates(self) -> bool:
        """Return whether every part has its own learning rate, so that --learning_rate is not used."""
        return bool(self.blocks) and None not in self.text_encoder_rates.values()


class CheckpointWriter(Protocol):
    """Writer of full checkpoints: trained networks from memory, everything else from the source file."""

    def write(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write the checkpoint to `path`.

        Args:
            path: File or folder to write.
            dtype: Dtype of all network tensors; None keeps the dtypes of the source file.
            metadata: Metadata for the file's header.

        Raises:
            OutputError: If it cannot be written.
        """


class TrainsCheckpoint(Described, Encodes, Protocol):
    """A family whose training runs write full checkpoints and can train text encoders."""

    @property
    def learning_parts(self) -> LearningParts:
        """The parts of the checkpoint that this run trains, with their learning rates."""

    def reads_weight(self, text_encoder: str, weight: str) -> bool:
        """Return whether the outputs of a text encoder depend on the weight of this name."""

    def checkpoint_bytes(self, dtype: torch.dtype | None) -> int:
        """Return the size in bytes of a checkpoint from `CheckpointWriter.write`, from headers alone."""

    def checkpoint_writer(
        self, networks: Mapping[str, nn.Module], as_folder: bool, shard_bytes: int
    ) -> CheckpointWriter:
        """Create an object that saves checkpoints.

        Args:
            networks: Trained networks by name: DIT for the transformer, and the names of text encoders.
            as_folder: Write a folder in the layout of diffusers instead of one file.
            shard_bytes: Largest size of a file in the folder; 0 for one file per network.
        """

    @property
    def is_single_file(self) -> bool:
        """Whether the trained checkpoint is a single file instead of a folder."""

    @property
    def keeps_shapes(self) -> bool:
        """Whether the weights keep the shapes that they started with, so that both can be compared."""


DIT = "dit"  # the transformer among `networks`


def trains_checkpoint(family: Described) -> TypeGuard[TrainsCheckpoint]:
    """Return whether training runs of the family write full checkpoints."""
    return family.abilities.trains_checkpoint
