"""Embeddings of images and clips, stored on disk by file content, so that a stopped run can continue."""

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from checkpoints.writing import save_tensors
from modules.bars import Bar
from modules.errors import MediaError
from modules.media.reading import VIDEO_SUFFIXES, Frame, pick_frames, read_image
from training.scoring.model import EmbedsImages

logger = logging.getLogger(__name__)

SAVE_SECONDS = 20.0  # minimum time between two writes to disk


@dataclass(frozen=True)
class Medium:
    """An image or clip to embed."""

    name: str  # for messages
    open: Callable[[], AbstractContextManager[Path]]  # yields a file, or a folder of frames


@dataclass
class VectorStore:
    """Embeddings on disk, keyed by a hash of the embedded file; leaving the context writes new ones."""

    path: Path
    vectors: dict[str, Tensor] = field(default_factory=dict)  # each F D float32: one row for each frame
    _written: int = 0
    _saved: float = field(default_factory=time.monotonic)

    def __enter__(self) -> "VectorStore":
        if self.path.is_file():
            try:
                self.vectors = load_file(self.path)
            except (OSError, SafetensorError) as error:
                logger.warning("%s cannot be read (%s): its vectors are computed again.", self.path, error)
        self._written = len(self.vectors)
        return self

    def __exit__(self, *_: object) -> None:
        self.write()

    def add(self, key: str, vectors: Tensor) -> None:
        """Add vectors under a key; write the store if the last write was at least SAVE_SECONDS ago."""
        self.vectors[key] = vectors
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the vectors if there are new ones. Raises OutputError if they cannot be written."""
        self._saved = time.monotonic()
        if len(self.vectors) > self._written:
            save_tensors(self.path, self.vectors)
            self._written = len(self.vectors)


def vectors_path(folder: Path, model: EmbedsImages) -> Path:
    """Return the path of the file that stores a model's embeddings, in the folder of a run."""
    return folder / f".scores-{model.identity}.safetensors"


@dataclass
class Embedder:
    """Compute embeddings that are not in the store yet, in batches of frames."""

    model: EmbedsImages
    store: VectorStore
    num_frames: int  # frames per clip
    batch_size: int
    unreadable: list[str] = field(default_factory=list)
    _queue: list[tuple[str, list[Frame]]] = field(default_factory=list)  # keys and frames

    def embed(self, media: Sequence[Medium], title: str) -> list[Tensor | None]:
        """Return for each image or clip one vector per frame, F D; None if it cannot be read.

        Args:
            media: Images and clips.
            title: Kind of media, shown on the progress bar.
        """
        keys: list[str | None] = []  # key of each medium in the store
        with Bar(len(media), title, "file") as bar:
            for medium in media:
                try:
                    with medium.open() as path:
                        keys.append(self._queue_if_missing(path))
                except (MediaError, OSError) as error:
                    logger.warning("%s is left out: %s", medium.name, error)
                    self.unreadable.append(medium.name)
                    keys.append(None)
                bar.update()
            self._embed_queue()
        return [None if key is None else self.store.vectors[key] for key in keys]

    def _queue_if_missing(self, path: Path) -> str:
        """Return the key of a file's embeddings, and queue the file if they are not stored."""
        is_clip = path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES
        # The SHA-256 of a file, or of the files in a folder. Raises OSError if one cannot be read.
        digest = hashlib.sha256()
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        key = digest.hexdigest()
        if is_clip:
            key = f"{key}-{self.num_frames}"
        if key in self.store.vectors or any(waiting == key for waiting, _ in self._queue):
            return key
        self._queue.append((key, read_frames(path, self.num_frames)))
        if sum(len(frames) for _, frames in self._queue) >= self.batch_size:
            self._embed_queue()
        return key

    def _embed_queue(self) -> None:
        """Embed the frames of all queued files in shared batches, and store the vectors of each file."""
        frames = [frame for _, frames_of_one in self._queue for frame in frames_of_one]
        batches = [
            self.model.embed_images(frames[start : start + self.batch_size])
            for start in range(0, len(frames), self.batch_size)
        ]
        if not batches:
            return
        vectors = torch.cat(batches)
        start = 0
        for key, frames_of_one in self._queue:
            self.store.add(key, vectors[start : start + len(frames_of_one)].clone())
            start += len(frames_of_one)
        self._queue.clear()


def read_frames(path: Path, num_frames: int) -> list[Frame]:
    """Return an image as one frame, H W 3, or evenly spaced frames of a clip.

    Raises MediaError if the file cannot be read.
    """
    if path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES:
        return pick_frames(path, lambda length: _select_evenly(length, num_frames), lambda frame: frame)
    return [read_image(path)]


def _select_evenly(length: int, maximum: int) -> set[int]:
    """Return the middle frame of each of `maximum` equal parts, or all frames."""
    if length <= maximum:
        return set(range(length))
    return {int((index + 0.5) * length / maximum) for index in range(maximum)}


def open_path(path: Path) -> Medium:
    """Return the `Medium` for a file on disk."""
    return Medium(path.name, lambda: contextlib.nullcontext(path))
