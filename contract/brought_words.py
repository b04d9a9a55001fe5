"""What a generation asks of a family whose prompts may have learned words that LoRA files bring along."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeGuard

from torch import Tensor

from contract.family import Family

# what a file of one word holds: tensors by name, or tables of them
WordContent = Mapping[str, Tensor | Mapping[str, Tensor]]
BundledWords = Mapping[str, WordContent]  # of a LoRA file, by word
WordsByFile = Mapping[Path, BundledWords]


class TakesWords(Family, Protocol):
    """A family whose text encoders can be given vectors of further words."""

    # option: that names the files; CheckpointError for vectors that do not fit
    def with_words(self, files: WordsByFile, option: str) -> Family: ...


def takes_words(family: Family) -> TypeGuard[TakesWords]:
    return family.can.take_words
