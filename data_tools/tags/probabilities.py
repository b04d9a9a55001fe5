"""Probabilities of tags in images, for scores of samples."""
# Letters: N images, T tags

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_tools.tags.model import MODEL_NAME, Tagger, load_tagger
from modules.media.reading import Frame


@dataclass(frozen=True)
class TagProbabilities:
    """A tagger that represents an image by the vector of its tag probabilities."""

    tagger: Tagger
    identity: str  # equal for folders with the same tagger

    @property
    def names(self) -> list[str]:
        """Tag names, in the order of the probabilities."""
        return [label.name for label in self.tagger.labels]

    def embed_images(self, frames: Sequence[Frame]) -> Tensor:
        """Return the embeddings of frames, H W 3 each: the probability of each tag, N T float32.

        Raises:
            CheckpointError: If the network fails.
            MemoryPlanError: If memory runs out.
        """
        return torch.from_numpy(
            self.tagger.predict_probabilities([self.tagger.pad_and_resize(frame) for frame in frames])
        )


def load_tag_probabilities(folder: Path, batch_size: int) -> TagProbabilities:
    """Load a tagger for embedding images as tag probabilities.

    Raises:
        CheckpointError: If the folder does not contain a tagger.
        InstallationError: If onnxruntime is missing.
    """
    tagger = load_tagger(folder, batch_size, averages_frames=False, max_frames=1, option="--tagger")
    with (folder / MODEL_NAME).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    names = "\n".join(label.name for label in tagger.labels)
    return TagProbabilities(tagger, hashlib.sha256(f"{digest}\n{names}".encode()).hexdigest()[:16])
