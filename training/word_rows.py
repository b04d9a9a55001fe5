"""The vectors of a word that text encoders learn next to the network of a training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.writing import save_tensors
from contract.family import Described
from contract.new_words import TaughtWord, taught_word_of
from modules.seeds import derive_seed
from networks.bundled_words import bundle_word
from training.trainable import Trainable

WORD = "word"  # their part in states


@dataclass(frozen=True)
class WordRows:
    """The vectors of a word that text encoders learn next to a network."""

    taught: TaughtWord
    module: nn.Module  # its state dict is what a file of the word alone holds

    def list_in_lora(self) -> dict[str, Tensor]:
        """Return the vectors by their names in a LoRA's file; log what there is to say of them."""
        self.taught.network.report(self.module)
        return bundle_word(self.taught.word.text, self.module.state_dict())

    def write(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write a file of the word alone. dtype: of its vectors; None: as trained."""
        rows = self.module.state_dict()
        tensors = {name: vectors.to("cpu", dtype).contiguous() for name, vectors in rows.items()}
        save_tensors(path, tensors, metadata)

    def group(self, learning_rate: float) -> dict[str, Any]:
        """Return the group of the optimizer. learning_rate: of the network."""
        rate = self.taught.word.rate
        return {"params": [*self.module.parameters()], "lr": learning_rate if rate is None else rate}

    def add_to(self, trainable: Trainable, learning_rate: float, total_steps: int) -> Trainable:
        """Return what learns with the vectors. learning_rate, total_steps: of the run."""
        word = self.taught.word
        return replace(
            trainable,
            modules={**trainable.modules, WORD: self.module},
            groups=[*trainable.groups, self.group(learning_rate)],
            group_names=(*trainable.group_names, f"the word {word.text}"),
            writes_beside={word.text: self.write} if word.has_file else {},
            until={**trainable.until, WORD: math.ceil(word.until * total_steps)},
        )


def make_word_rows(
    family: Described,
    encoders: Mapping[str, nn.Module],
    seed: int,
    device: torch.device,
    with_values: bool = True,
) -> WordRows | None:
    """Make the vectors of the word that a family learns, and let its text encoders read them; None: no word.

    encoders: the loaded networks of those that learn it, by the prefixes of their names in LoRA files.
    with_values: as in `make_trained_network`.
    """
    taught = taught_word_of(family)
    if taught is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, WORD))
        module = taught.network.make(nn.ModuleDict(encoders), with_values)
    return WordRows(taught, module.to(device=device, dtype=torch.float32).requires_grad_(True))
