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
        return self.texts.get(text_encoder, 0) != 0 and self.text_steps != 0

    @property
    def have_own_rates(self) -> bool:
        """Return whether every part has a rate of its own, so that none learns at --learning_rate."""
        return bool(self.blocks) and None not in self.texts.values()


class CheckpointWriter(Protocol):
    """Writes a whole checkpoint: what was trained from the networks, all else from the source."""

    # dtype: of all tensors of networks; None: that of the source. OutputError if it cannot be written
    def write(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None: ...


class TrainsCheckpoint(Described, Encodes, Protocol):
    """A family of which a training writes whole checkpoints, and may train text encoders."""

    @property
    def learning_parts(self) -> LearningParts: ...

    # whether anything that the text encoder of this name returns depends on its weight of this name
    def reads_weight(self, text_encoder: str, weight: str) -> bool: ...

    # bytes of a file that is written; dtype: as `CheckpointWriter.write`. Reads headers alone
    def checkpoint_bytes(self, dtype: torch.dtype | None) -> int: ...

    # networks: those that learn: by the names of text encoders, and DIT. as_folder: in diffusers' layout;
    # shard_bytes: of a file of a network in it, at most; 0: each network has one file
    def checkpoint_writer(
        self, networks: Mapping[str, nn.Module], as_folder: bool, shard_bytes: int
    ) -> CheckpointWriter: ...

    # whether the checkpoint that is trained is a single file
    @property
    def is_of_one_file(self) -> bool: ...


DIT = "dit"  # the transformer among `networks`


def trains_checkpoint(family: Described) -> TypeGuard[TrainsCheckpoint]:
    return family.can.train_checkpoint
