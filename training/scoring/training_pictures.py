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

NUM_NEAREST = (
    3  # the likeness is the mean over this number of training images, or over all if there are fewer
)
# A sample is very close to a training image if its cosine is above this quantile of the training images'
# cosines to their own nearest image. A fixed cosine says little: in a dataset of one person, all are similar.
NEAR_QUANTILE = 0.99
MIN_TO_COMPARE = 8  # with fewer training images, the quantile says nothing
MAX_TO_AVERAGE = 512  # media whose likeness to all others is averaged
BLOCK_ROWS = 1024  # rows per block when multiplying all pairs of vectors


class Neighbor(NamedTuple):
    """Index of a training image or clip, and its cosine similarity to a sample."""

    media_index: int  # index in `TrainingVectors.media`
    cosine: float


@dataclass(frozen=True)
class TrainingVectors:
    """Embeddings of all frames of the training images and clips."""

    media: Sequence[Medium]
    vectors: Tensor  # M D: vectors of all frames, one medium after the other
    media_indices: Tensor  # M: index of the medium of each frame

    @classmethod
    def of(cls, media: Sequence[Medium], vectors: Sequence[Tensor | None]) -> "TrainingVectors | None":
        """Join the vectors of all readable media; None if no medium could be read."""
        readable_media: list[Medium] = []
        readable_vectors = []
        media_indices = []
        for medium, frame_vectors in zip(media, vectors, strict=True):
            if frame_vectors is not None:
                media_indices.append(torch.full((len(frame_vectors),), len(readable_media)))
                readable_media.append(medium)
                readable_vectors.append(frame_vectors)
        if not readable_media:
            return None
        return cls(readable_media, torch.cat(readable_vectors), torch.cat(media_indices))

    def compare(self, frames: Tensor) -> Tensor:
        """Return the similarity of a sample to each medium: the largest cosine, averaged over its frames.

        Args:
            frames: Embeddings of the sample's frames, F D.
        """
        cosines = frames @ self.vectors.T  # F M
        largest = torch.full((len(frames), len(self.media)), -2.0)
        largest.scatter_reduce_(1, self.media_indices.expand(len(frames), -1), cosines, "amax")
        return largest.mean(0)

    def find_nearest(self, frames: Tensor) -> list[Neighbor]:
        """Return the training media most similar to a sample, in order of decreasing similarity."""
        values, places = self.compare(frames).topk(min(NUM_NEAREST, len(self.media)))
        return [Neighbor(*pair) for pair in zip(places.tolist(), values.tolist(), strict=True)]

    def measure_mutual_likeness(self) -> float | None:
        """Return the mean likeness of the media to the nearest others, as `find_nearest` measures samples.

        Of more than MAX_TO_AVERAGE media, evenly spaced ones are averaged. None for a single medium.
        """
        count = len(self.media)
        if count < 2:
            return None
        step = -(-count // MAX_TO_AVERAGE)
        likenesses = []
        for index in range(0, count, step):
            cosines = self.compare(self.vectors[self.media_indices == index])
            cosines[index] = -2.0
            likenesses.append(float(cosines.topk(min(NUM_NEAREST, count - 1)).values.mean()))
        return sum(likenesses) / len(likenesses)

    def near_threshold(self) -> float | None:
        """Return the 99th percentile of each training image's highest cosine similarity to any other.

        A sample above it counts as very close to its training image. None if there are too few images.
        """
        if len(self.media) < MIN_TO_COMPARE:
            return None
        highest = torch.full((len(self.media),), -2.0)
        for start in range(0, len(self.vectors), BLOCK_ROWS):
            cosines = self.vectors[start : start + BLOCK_ROWS] @ self.vectors.T
            media_indices = self.media_indices[start : start + BLOCK_ROWS]
            cosines[media_indices[:, None] == self.media_indices[None, :]] = -2.0
            highest.scatter_reduce_(0, media_indices, cosines.amax(1), "amax")
        return float(torch.quantile(highest[: 1 << 20], NEAR_QUANTILE))


def list_training_media(config: DatasetConfig) -> list[Medium]:
    """Return the images and clips of the tables that are trained.

    Regularization images are not included.

    Raises:
        DatasetError: If a folder or list of a table is missing.
    """
    media = []
    for table in config.datasets:
        if table.learning.validation or table.learning.is_reg or table.source.is_audio_only:
            continue
        ignored_faults: list[Fault] = []
        for source in find_sources(table, captions=False, faults=ignored_faults):
            media.append(Medium(str(source.path), partial(_open_source, source)))
    return media


@contextmanager
def _open_source(source: MediaSource) -> Iterator[Path]:
    media_only = replace(source, control=(), mask=None, remote_or_packed=source.remote_or_packed[:1])
    with fetch(media_only) as fetched:
        yield fetched.path


def are_copies(sample: Sequence[Frame], picture: Sequence[Frame]) -> bool:
    """Return whether a frame of a sample is nearly the same as a frame of a training image or clip.

    As on the dataset's page, copies may differ in size and brightness.
    """
    frames = [[frame] for frame in (*sample, *picture)]
    measures = [measure_frames(frame, is_clip=False) for frame in frames]
    groups = group_copies(measures)
    return any(min(group) < len(sample) <= max(group) for group in groups)


def is_copy(sample: AbstractContextManager[Path], picture: Medium, num_frames: int) -> bool:
    """Read a sample and a training image or clip; return whether the sample is a copy (see `are_copies`)."""
    with sample as sample_path, picture.open() as image_path:
        return are_copies(read_frames(sample_path, num_frames), read_frames(image_path, num_frames))
