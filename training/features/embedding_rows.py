"""The vectors of a word that text encoders learn next to the network of a training: --train_embedding."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.opening import open_checkpoint
from checkpoints.writing import save_tensors
from contract.new_words import TaughtWord
from modules.seeds import derive_seed
from networks.bundled_words import bundle_word, word_of
from training.trainable import FileBeside, Trainable

logger = logging.getLogger(__name__)

WORD = "word"  # their part in states


@dataclass(frozen=True)
class WordRows:
    """The vectors of a word that text encoders learn next to a network."""

    taught: TaughtWord
    module: nn.Module  # its state dict is what a file of the word alone holds
    has_file: bool = False  # they are saved alone too

    def list_in_lora(self) -> dict[str, Tensor]:
        """Return the vectors by their names in a LoRA's file; log what there is to say of them."""
        self.taught.network.report(self.module)
        return self.tensors()

    def tensors(self) -> dict[str, Tensor]:
        """Return the trained vectors under the names of an embedding bundled in a LoRA file."""
        return bundle_word(self.taught.word.text, self.module.state_dict())

    def write(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write a file of the word alone. dtype: of its vectors; None: as trained."""
        rows = self.module.state_dict()
        tensors = {name: vectors.to("cpu", dtype).contiguous() for name, vectors in rows.items()}
        save_tensors(path, tensors, metadata)

    def group(self, learning_rate: float) -> dict[str, Any]:
        """Return the group of the optimizer. learning_rate: of the network."""
        rate = self.taught.word.rate
        # no decay: it would pull the word towards zero, where no known word is
        return {
            "params": [*self.module.parameters()],
            "lr": learning_rate if rate is None else rate,
            "weight_decay": 0.0,
        }

    def add_to(
        self, trainable: Trainable, learning_rate: float, total_steps: int, device: torch.device
    ) -> Trainable:
        """Return what learns with the vectors, which move to the device.

        learning_rate, total_steps: of the run.
        """
        word, ending = self.taught.word, self.taught.network.ending
        self.module.to(device=device, dtype=torch.float32)
        return replace(
            trainable,
            modules={**trainable.modules, WORD: self.module},
            groups=[*trainable.groups, self.group(learning_rate)],
            group_names=(*trainable.group_names, f"the word {word.text}"),
            writes_beside={word.text: FileBeside(self.write, ending)} if self.has_file else {},
            until={**trainable.until, WORD: math.ceil(word.until * total_steps)},
        )


def make_word_rows(
    taught: TaughtWord, has_file: bool, encoders: Mapping[str, nn.Module], seed: int, with_values: bool
) -> WordRows:
    """Make the vectors of a word, on the CPU, and let text encoders read them.

    Args:
        taught: The word, and the network of its vectors.
        has_file: Whether they are saved alone too.
        encoders: The loaded networks of the text encoders that learn it, by the prefixes of their names in
            LoRA files.
        seed: Of the run.
        with_values: Whether they begin with the values of a file, as in `make_trained_network`.
    """
    if with_values:
        _note_beginning(taught)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, WORD))
        module = taught.network.make(nn.ModuleDict(encoders), with_values)
    return WordRows(taught, module.requires_grad_(True), has_file)


def _note_beginning(taught: TaughtWord) -> None:
    """Log that the vectors continue from those in the LoRA that the training continues from."""
    word = taught.word
    if word.lora is None or word.weights is not None:
        return
    with open_checkpoint(word.lora) as checkpoint:
        words = {word_of(name) for name in checkpoint.tensors}
    if word.text in words:
        logger.info("The vectors of %s continue from %s.", word.text, word.lora)
