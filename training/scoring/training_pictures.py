"""Find the training images and clips that are most similar to a sample, and whether it is a copy of one."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data_tools.report.looks import measure_frames
from data_tools.report.run import group_copies
from dataset.config import DatasetConfig
from dataset.listing import find_sources
from dataset.sources.fetching import fetch
from dataset.sources.media_source import Fault, MediaSource
from modules.media.reading import Frame
from training.scoring.embeddings import Medium, read_frames

logger = logging.getLogger(__name__)

NEAREST = 3  # the likeness is the mean over this number of training images, or over all if there are fewer
# A sample is very near to a training image if its cosine is above this quantile of the training images'
# cosines to their own nearest image. A fixed cosine says little: in a dataset of one person, all are similar.
NEAR_SHARE = 0.99
MIN_TO_COMPARE = 8  # with fewer training images, the quantile says nothing
ROWS = 1024  # rows of a block, when all vectors are multiplied with all


class Neighbor(NamedTuple):
    """A training image or clip, by its index, and its cosine similarity to a sample."""

    place: int  # index in `TrainingVectors.media`
    cosine: float


@dataclass(frozen=True)
class TrainingVectors:
    """Embeddings of all frames of the training images and clips."""

    media: Sequence[Medium]
    vectors: Tensor  # M D: vectors of all frames, one medium after the other
    owners: Tensor  # M: index of the medium of each frame

    @classmethod
    def of(cls, media: Sequence[Medium], vectors: Sequence[Tensor | None]) -> "TrainingVectors | None":
        """Join the vectors of all readable media; None if no medium could be read."""
        kept = [(medium, rows) for medium, rows in zip(media, vectors, strict=True) if rows is not None]
        if not kept:
            return None
        owners = [torch.full((len(rows),), index) for index, (_, rows) in enumerate(kept)]
        return cls([medium for medium, _ in kept], torch.cat([rows for _, rows in kept]), torch.cat(owners))

    def compare(self, frames: Tensor) -> Tensor:
        """Return the similarity of a sample to each medium: the largest cosine, averaged over its frames.

        Args:
            frames: Vectors of the sample, F D.
        """
        cosines = frames @ self.vectors.T  # F M
        largest = torch.full((len(frames), len(self.media)), -2.0)
        largest.scatter_reduce_(1, self.owners.expand(len(frames), -1), cosines, "amax")
        return largest.mean(0)

    def find_nearest(self, frames: Tensor) -> list[Neighbor]:
        """Return the training media most similar to a sample, in order of decreasing similarity."""
        values, places = self.compare(frames).topk(min(NEAREST, len(self.media)))
        return [Neighbor(*pair) for pair in zip(places.tolist(), values.tolist(), strict=True)]

    def near_threshold(self) -> float | None:
        """Return the cosine that 99 % of training images stay below to all others; None for too few images.

        A sample above it counts as very near to its training image.
        """
        if len(self.media) < MIN_TO_COMPARE:
            return None
        highest = torch.full((len(self.media),), -2.0)
        for start in range(0, len(self.vectors), ROWS):
            cosines = self.vectors[start : start + ROWS] @ self.vectors.T
            owners = self.owners[start : start + ROWS]
            cosines[owners[:, None] == self.owners[None, :]] = -2.0
            highest.scatter_reduce_(0, owners, cosines.amax(1), "amax")
        return float(torch.quantile(highest[: 1 << 20], NEAR_SHARE))


def list_training_media(config: DatasetConfig) -> list[Medium]:
    """Return the images and clips of the tables that are trained.

    Regularization images are not included.

    Raises:
        DatasetError: If a folder or list of a table is missing.
    """
    media = []
    for table in config.datasets:
        if table.validation or table.is_reg or table.is_of_audio:
            continue
        errors: list[Fault] = []
        for source in find_sources(table, captions=False, faults=errors):
            media.append(Medium(str(source.path), partial(_open_source, source)))
    return media


@contextmanager
def _open_source(source: MediaSource) -> Iterator[Path]:
    alone = replace(source, control=(), mask=None, remote_or_packed=source.remote_or_packed[:1])
    with fetch(alone) as fetched:
        yield fetched.path


def are_copies(sample: Sequence[Frame], picture: Sequence[Frame]) -> bool:
    """Return whether a frame of a sample is nearly the same as a frame of a training image or clip.

    As on the dataset's page, copies have the same shapes and colors in any size and brightness.
    """
    frames = [[frame] for frame in (*sample, *picture)]
    measures = [measure_frames(frame, is_clip=False) for frame in frames]
    groups = group_copies(measures)
    return any(min(group) < len(sample) <= max(group) for group in groups)


def is_copy(sample: AbstractContextManager[Path], picture: Medium, num_frames: int) -> bool:
    """Compare a sample with a training image pixel by pixel; return whether it is a copy."""
    with sample as sample_path, picture.open() as image_path:
        return are_copies(read_frames(sample_path, num_frames), read_frames(image_path, num_frames))
