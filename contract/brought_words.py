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

    def with_words(self, files: WordsByFile, option: str) -> Family:
        """Return the family with the words of LoRA files in its text encoders.

        Args:
            files: Words with their vectors, by LoRA file.
            option: Option that names the files, for messages.

        Raises:
            CheckpointError: If vectors do not fit the text encoders.
        """


def takes_words(family: Family) -> TypeGuard[TakesWords]:
    """Return whether the family's text encoders can be given vectors of words."""
    return family.can.take_words
