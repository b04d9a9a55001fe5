"""The vectors of a word that text encoders learn next to the network of a training."""

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
from contract.family import Described
from contract.new_words import TaughtWord, taught_word_of
from modules.seeds import derive_seed
from networks.bundled_words import bundle_word, word_of
from training.trainable import Trainable

logger = logging.getLogger(__name__)

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
        word = self.taught.word
        self.module.to(device=device, dtype=torch.float32)
        return replace(
            trainable,
            modules={**trainable.modules, WORD: self.module},
            groups=[*trainable.groups, self.group(learning_rate)],
            group_names=(*trainable.group_names, f"the word {word.text}"),
            writes_beside={word.text: self.write} if word.has_file else {},
            until={**trainable.until, WORD: math.ceil(word.until * total_steps)},
        )


def note_brought_words(lora: Path | None, taught: TaughtWord | None) -> None:
    """Log which words of a LoRA that a training continues from learn on; warn of those that are lost."""
    if lora is None:
        return
    with open_checkpoint(lora) as checkpoint:
        words = {word_of(name) for name in checkpoint.tensors} - {""}
    for word in sorted(words):
        if taught is None or taught.word.text != word:
            logger.warning(
                "%s brings the word %s, which is not trained on and will not be in the new file. Give "
                "--train_embedding %s to train both",
                lora,
                word,
                word,
            )
        elif taught.word.weights is None:
            logger.info("The vectors of %s continue from %s.", word, lora)


def make_word_rows(
    family: Described,
    encoders: Mapping[str, nn.Module],
    seed: int,
    with_values: bool = True,
) -> WordRows | None:
    """Make the vectors of the word that a family learns, and let its text encoders read them; None: no word.

    encoders: the loaded networks of those that learn it, by the prefixes of their names in LoRA files.
    with_values: as in `make_trained_network`. They are on the CPU.
    """
    taught = taught_word_of(family)
    if taught is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, WORD))
        module = taught.network.make(nn.ModuleDict(encoders), with_values)
    return WordRows(taught, module.requires_grad_(True))
