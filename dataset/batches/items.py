"""Training items as the loops see them, and what of them is encoded while training."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from dataset.cache.files import EMPTY, SUFFIX, LatentName, empty_text_name, text_file_name
from dataset.config import DatasetTable
from dataset.sources.media_source import MediaSource
from modules.media.buckets import Size


@dataclass(frozen=True)
class ItemKind:
    """Facts that all items of a table share."""

    tag: str  # the family's cache_tag
    text_keys: frozenset[str] = frozenset()  # what a text file has to hold
    has_latents: bool = True  # False: pictures are encoded while training
    has_text: bool = True  # False: captions are


@dataclass(frozen=True, slots=True)
class TrainingItem:
    """A pair of cache files. There may be millions."""

    file_name: str  # of the latents; whole, as the listing has it: a copy of each would be a lot
    stem_length: int  # of `file_name`, how much is the name of the source
    table: DatasetTable
    # width, height in pixels; for videos also frames: of a section, those that it decodes to
    bucket: tuple[int, ...]
    kind: ItemKind
    parts: int = 1  # how many files of the same clip are there
    captions: int = 1  # how many text files of the source are there, besides the empty prompt's

    @property
    def key(self) -> str:
        """The name of the latent file without suffix."""
        return self.file_name.removesuffix(SUFFIX)

    @property
    def source_stem(self) -> str:
        """The name of the source without suffix."""
        return self.file_name[: self.stem_length]

    @property
    def group(self) -> tuple[int, ...]:
        """The common key of a batch's items: their table, or its group, and their bucket."""
        return (self.table.batch_group, *self.bucket)

    @property
    def latent_path(self) -> Path:
        return self.table.cache_directory / f"{self.key}{SUFFIX}"

    @property
    def text_path(self) -> Path:
        """The file of the first caption."""
        return self.caption_path(0)

    def caption_path(self, number: int) -> Path:
        """Return the text file of a caption, or of the empty prompt if `number` is EMPTY."""
        tag = self.kind.tag
        name = empty_text_name(tag) if number == EMPTY else text_file_name(self.source_stem, tag, number)
        return self.table.cache_directory / name


def tables_of(items: Iterable[TrainingItem]) -> list[DatasetTable]:
    """Return the tables of items, by index."""
    return [table for _, table in sorted({item.table.index: item.table for item in items}.items())]


def group_items(items: Iterable[TrainingItem]) -> dict[tuple[int, ...], list[TrainingItem]]:
    """Return the items that can share a batch."""
    groups: dict[tuple[int, ...], list[TrainingItem]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    return groups


@dataclass(frozen=True)
class LiveTable:
    """Parts that training reads from a table's sources."""

    sources: Mapping[str, MediaSource]  # by stem
    texts: bool  # captions are not cached
    sizes: Mapping[str, Size] | None = None  # of pictures, by stem; None: their latents are cached

    @property
    def media(self) -> bool:
        """Return whether pictures are not cached."""
        return self.sizes is not None

    def latent_names(self, tag: str) -> list[str]:
        """Return the names that latent caches of its pictures would have. tag: the family's cache_tag."""
        return [LatentName(stem, size).file_name(tag) for stem, size in (self.sizes or {}).items()]

    def num_captions(self, stem: str) -> int:
        """Return how many captions a source has."""
        return 1 + len(self.sources[stem].more_captions)

    def caption(self, stem: str, number: int) -> str:
        """Return a caption of a source as its file has it. number: EMPTY for the empty one."""
        if number == EMPTY:
            return ""
        source = self.sources[stem]
        return (source.caption or "", *source.more_captions)[number]


@dataclass(frozen=True)
class LiveParts:
    """Parts of a batch that do not come from caches."""

    tables: Mapping[int, LiveTable] = field(default_factory=dict)  # by index
    # what was encoded for items of the batch, by their places: tensors without batch dimension
    encoded: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)


NO_LIVE_PARTS = LiveParts()
