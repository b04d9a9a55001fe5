"""A source of a dataset: an image or clip with its caption and companions; nothing is opened yet.

Its bytes are in a file at its path, in a tar, in a table, or at an address.
"""

import contextlib
import errno
import gc
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dataset.config import DatasetTable
from dataset.table import FROM_ALPHA, FROM_FILE

# folders beside that of the clips, in CogVideoX form
MOMENTS, IMAGE_MOMENTS, EMBEDS = "video_latents", "image_latents", "prompt_embeds"
PIECE = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in a tar that is not compressed."""

    tar: Path
    offset: int  # of its first byte
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Remote:
    """A file at an address; once it is downloaded it lies at the source's path."""

    address: str = field(repr=False)  # with its password and signature


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """A file in a row of a Parquet file."""

    file: Path
    group: int  # of rows; both from 0
    row: int  # in the group
    column: str  # "image.bytes"


Origin = TarMember | Remote | ParquetCell


@dataclass(frozen=True, slots=True)
class GivenTensors:
    """Files of tensors computed for a clip before. They may be millions: they are not opened here."""

    folder: Path  # that the folders are in; shared
    name: str  # of the files, without suffix
    has_embeds: bool
    uses_image: bool = True

    @property
    def moments(self) -> Path:
        """Return the file of the clip's moments."""
        return self.folder / MOMENTS / f"{self.name}.pt"

    @property
    def image(self) -> Path | None:
        """Return the file of moments of the first frame alone, there or not; None if not used."""
        return self.folder / IMAGE_MOMENTS / f"{self.name}.pt" if self.uses_image else None

    @property
    def embeds(self) -> Path | None:
        """Return the file of the caption's embeddings; None if there are none."""
        return self.folder / EMBEDS / f"{self.name}.pt" if self.has_embeds else None


@dataclass(frozen=True, slots=True)
class MediaSource:
    """An image or clip of a table. No media file has been opened."""

    # a file, or for a clip also a folder of images. In a tar: only a name for it. At an address: where its
    # download is, or will be. `fetch` gives files that can be opened
    path: Path
    stem: str  # file name without suffix: the beginning of its cache names, unique within the table
    caption: str | None  # None: missing (see `missing_captions`), or not read
    # the text file of the caption, there or not; None: in a list, or no caption_extension
    caption_path: Path | None
    control: tuple[Path, ...]  # control images in order, or one control clip; () without control
    table: DatasetTable
    more_captions: tuple[str, ...] = ()  # of multi_caption: those after the first
    mask: Path | None = None  # an image, clip or folder of images: white is learned
    tensors: GivenTensors | None = None  # with load_tensors: instead of `path`, which may be missing
    origins: tuple[Origin | None, ...] = ()  # of each of `parts`; (): all of them are on disk

    @property
    def parts(self) -> tuple[tuple[Path, Origin | None], ...]:
        """Return the files or folders that latents are made from, and where each is if not on disk.

        The media, its control media and its mask; or what was computed before.
        """
        if self.tensors is not None:
            given = (self.tensors.moments, self.tensors.image)
            return tuple((path, None) for path in given if path is not None)
        paths = (self.path, *self.control, *(() if self.mask is None else (self.mask,)))
        return tuple(zip(paths, self.origins or (None,) * len(paths), strict=True))

    @property
    def mask_from(self) -> str | None:
        """Return FROM_FILE, FROM_ALPHA, or None."""
        return FROM_ALPHA if self.table.alpha_mask else FROM_FILE if self.mask is not None else None


def origin_stamp(origin: TarMember | ParquetCell) -> tuple[int, int]:
    """Return the size and time of a part of a file: the time is that of the whole.

    The size of a cell is 0: it is not known without reading it. Raises OSError if the file is gone.
    """
    if isinstance(origin, ParquetCell):
        return 0, os.stat(origin.file).st_mtime_ns  # noqa: PTH116  # a third faster, a million times
    return origin.size_bytes, os.stat(origin.tar).st_mtime_ns  # noqa: PTH116


def member_pieces(origin: TarMember) -> Iterator[bytes]:
    """Yield the bytes of a member. Raises OSError if the tar is gone, or shorter than it was."""
    left = origin.size_bytes
    with origin.tar.open("rb") as file:
        file.seek(origin.offset)
        while left:
            piece = file.read(min(PIECE, left))
            if not piece:
                raise OSError(errno.EIO, "the tar is shorter than it was", str(origin.tar))
            left -= len(piece)
            yield piece


def hash_member(origin: TarMember) -> str:
    """Return the SHA-256 of a member. Raises OSError as `member_pieces`."""
    whole = hashlib.sha256()
    for piece in member_pieces(origin):
        whole.update(piece)
    return whole.hexdigest()


@contextlib.contextmanager
def pause_collection() -> Iterator[None]:
    """Pause Python's cycle collection during the block, unless it was off before.

    While a list of a million objects grows, the collector would visit all of them again and again: a third of
    the time. Objects outside cycles are freed as ever.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
