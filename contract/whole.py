"""What a training of all weights asks of a family whose checkpoint holds more than the transformer.

Such a file has text encoders and a VAE too. A training may train text encoders with the transformer, and each
of its files is a whole checkpoint again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeGuard

import torch
from torch import nn

from contract.family import Described, Encodes


@dataclass(frozen=True)
class LearningParts:
    """Hold which parts of a checkpoint learn, and at which rates. A part with the rate 0 does not learn."""

    # of text encoders that learn, by their names; None: that of all
    texts: Mapping[str, float | None] = field(default_factory=dict)
    # of the transformer's blocks, by their numbers in `DitSpec.numbered`; (): all have one rate
    blocks: tuple[float, ...] = ()
    text_steps: int | None = None  # the text encoders learn during so many steps; None: to the end

    def learns(self, text_encoder: str) -> bool:
        """Return whether a text encoder learns: it has a rate, and steps are left for text encoders."""
        return self.texts.get(text_encoder, 0) != 0 and self.text_steps != 0

    @property
    def have_own_rates(self) -> bool:
        """Return whether every part has a rate of its own, so that none learns at --learning_rate."""
        return bool(self.blocks) and None not in self.texts.values()


class CheckpointWriter(Protocol):
    """Writes a whole checkpoint: what was trained from the networks, all else from the source."""

    def write(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write the checkpoint to `path`.

        Args:
            path: File or folder to write.
            dtype: Dtype of all tensors of networks; None for that of the source.
            metadata: Texts for the file's header.

        Raises:
            OutputError: If it cannot be written.
        """


class TrainsCheckpoint(Described, Encodes, Protocol):
    """A family whose trainings write whole checkpoints, and may train text encoders."""

    @property
    def learning_parts(self) -> LearningParts:
        """Parts of the checkpoint that learn in this run, with their rates."""

    def reads_weight(self, text_encoder: str, weight: str) -> bool:
        """Return whether anything that a text encoder returns depends on the weight of this name."""

    def checkpoint_bytes(self, dtype: torch.dtype | None) -> int:
        """Return the bytes of a checkpoint as `CheckpointWriter.write` writes it, from headers alone."""

    def checkpoint_writer(
        self, networks: Mapping[str, nn.Module], as_folder: bool, shard_bytes: int
    ) -> CheckpointWriter:
        """Make the writer of checkpoints.

        Args:
            networks: Networks that learn, by the names of text encoders, and the transformer as DIT.
            as_folder: Write a folder in diffusers' layout, not one file.
            shard_bytes: Largest size of a file in the folder; 0 for one file per network.
        """

    @property
    def is_of_one_file(self) -> bool:
        """Whether the checkpoint that is trained is a single file, not a folder."""


DIT = "dit"  # the transformer among `networks`


def trains_checkpoint(family: Described) -> TypeGuard[TrainsCheckpoint]:
    """Return whether a training of the family writes whole checkpoints."""
    return family.can.train_checkpoint
