"""The embedding vectors of a new word, which are trained together with a network: --train_embedding."""

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
from modules.seeds import derive_seed
from protocols.bundled_embeddings import bundle_word, get_embedding_word
from protocols.family_networks import CustomNetwork
from protocols.new_tokens import WordToLearn
from training.trainable import Trainable, WrittenFile

logger = logging.getLogger(__name__)

WORD = "word"  # name of the vectors' part in states


@dataclass(frozen=True)
class TrainedWord:
    """The embedding vectors of a word, trained together with a network."""

    word: WordToLearn
    network: CustomNetwork  # describes the module with the vectors
    module: nn.Module  # its state dict is the content of an embedding file
    has_file: bool = False  # whether an embedding file is saved next to each LoRA

    def tensors_for_lora_file(self) -> dict[str, Tensor]:
        """Return the vectors by their names in a LoRA file, and log how to use the word with that file."""
        self.network.report(self.module)
        return self.tensors()

    def tensors(self) -> dict[str, Tensor]:
        """Return the trained vectors under the names of an embedding bundled in a LoRA file."""
        return bundle_word(self.word.text, self.module.state_dict())

    def write(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write an embedding file, which contains only the word.

        Args:
            path: Path of the file.
            dtype: Dtype of the vectors; None keeps the training dtype.
            metadata: Metadata of the file.
        """
        rows = self.module.state_dict()
        tensors = {name: vectors.to("cpu", dtype).contiguous() for name, vectors in rows.items()}
        save_tensors(path, tensors, metadata)

    def group(self, learning_rate: float) -> dict[str, Any]:
        """Return the parameter group of the optimizer.

        Args:
            learning_rate: Learning rate of the network.
        """
        rate = self.word.rate
        # no weight decay: it would pull the vectors towards zero, far from the vectors of known words
        return {
            "params": [*self.module.parameters()],
            "lr": learning_rate if rate is None else rate,
            "weight_decay": 0.0,
        }

    def add_to(
        self, trainable: Trainable, learning_rate: float, total_steps: int, device: torch.device
    ) -> Trainable:
        """Return `trainable` with the word's vectors added, after moving them to the device.

        Args:
            trainable: The trained parameters.
            learning_rate: Learning rate of the run.
            total_steps: Number of steps of the run.
            device: Device of the run.
        """
        word, ending = self.word, self.network.architecture_suffix
        files = {word.text: WrittenFile(self.write, ending)} if self.has_file else {}
        self.module.to(device=device, dtype=torch.float32)
        return replace(
            trainable,
            modules={**trainable.modules, WORD: self.module},
            groups=[*trainable.groups, self.group(learning_rate)],
            group_names=(*trainable.group_names, f"the word {word.text}"),
            written_files={**trainable.written_files, **files},
            # the step after which the word's vectors are no longer trained
            freeze_at_step={**trainable.freeze_at_step, WORD: math.ceil(word.train_fraction * total_steps)},
        )


def make_word_vectors(
    word: WordToLearn,
    network: CustomNetwork,
    has_file: bool,
    encoders: Mapping[str, nn.Module],
    seed: int,
    has_initial_values: bool,
) -> TrainedWord:
    """Create the embedding vectors of a word on the CPU, and add them to the text encoders.

    Args:
        word: Word to learn.
        network: Describes the module with the vectors.
        has_file: Whether the vectors are also saved in an embedding file.
        encoders: The loaded networks of the text encoders that learn the word, in the family's order.
        seed: Seed of the run.
        has_initial_values: Whether the vectors start with the values of a file; False where only sizes
        matter.
    """
    if has_initial_values:
        _log_continued_word(word)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, WORD))
        module = network.make(nn.ModuleDict(encoders), has_initial_values)
    return TrainedWord(word, network, module.requires_grad_(True), has_file)


def _log_continued_word(word: WordToLearn) -> None:
    """Log that training continues from the word's vectors in the LoRA of --network_weights."""
    if word.lora is None or word.weights is not None:
        return
    with open_checkpoint(word.lora) as checkpoint:
        words = {get_embedding_word(name) for name in checkpoint.tensors}
    if word.text in words:
        logger.info("The vectors of %s continue from %s.", word.text, word.lora)
