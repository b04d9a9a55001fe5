"""Training items as the loops see them, and what is encoded during training."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from dataset.cache_files import EMPTY, SUFFIX, LatentName, audio_file_name, empty_text_name, text_file_name
from dataset.config import DatasetTable
from dataset.sources.media_source import MediaSource
from modules.media.buckets import Size


@dataclass(frozen=True)
class TableCacheInfo:
    """Facts that all items of a table share: the names of their caches, and what is read during training."""

    tag: str  # the family's cache_tag
    text_keys: frozenset[str] = frozenset()  # names of the tensors that a complete text cache has
    has_cached_texts: bool = True  # False: captions are encoded during training
    # bucket by stem, of images that are encoded during training; None: the table's latents are cached
    on_the_fly_buckets: Mapping[str, Size] | None = field(default=None, compare=False, repr=False)
    # sources by stem, if media or captions are read from them during training
    on_the_fly_sources: Mapping[str, MediaSource] = field(default_factory=dict, compare=False, repr=False)
    # checksum of the record, by name of a cache file, from the index of the caches. Such a record is not
    # compared with the table and its sources again, because the index is used only if these are unchanged
    indexed_checksums: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def latent_names(self) -> list[str]:
        """Return the names that latent cache files of the images in `on_the_fly_buckets` would have."""
        return [
            LatentName(stem, size).file_name(self.tag)
            for stem, size in (self.on_the_fly_buckets or {}).items()
        ]

    def on_the_fly_caption(self, stem: str, number: int) -> str:
        """Return the unchanged caption of an item whose captions are encoded during training.

        `number` is the caption's index; EMPTY stands for the empty caption.
        """
        if number == EMPTY:
            return ""
        source = self.on_the_fly_sources[stem]
        return (source.caption or "", *source.more_captions)[number]


OnTheFlyTables = Mapping[int, TableCacheInfo]  # by table index: tables with a part that is not cached


@dataclass(frozen=True, slots=True)
class TrainingItem:
    """A latent cache file and its text cache file. A run may have millions of items, so they are small."""

    file_name: str  # of the latent cache; the same object as in the folder's listing, to save memory
    stem_length: int  # number of characters of `file_name` that are the stem of the source
    table: DatasetTable
    # width, height in pixels; for videos also frames (of a section: the frames that it decodes to)
    bucket: tuple[int, ...]
    cache_info: TableCacheInfo
    num_latent_files: int = 1  # number of latent caches of the same clip
    num_captions: int = 1  # number of text caches of the source, without the empty prompt
    # width and height of the latents of each reference image, if they must be equal in a batch
    reference_latent_sizes: tuple[int, ...] = ()
    # shape C T M of the clip's audio latents, silent or not, if it must be equal in a batch
    audio_latent_shape: tuple[int, ...] = ()
    has_cached_audio: bool = False  # whether the clip's audio has a cache file
    # length of the latents of its reference audio, if it must be equal in a batch
    audio_reference_length: int = 0

    @property
    def key(self) -> str:
        """Name of the latent cache file without its suffix, for messages and the order of batches."""
        return self.file_name.removesuffix(SUFFIX)

    @property
    def source_stem(self) -> str:
        """First part of the cache file's name: the stem of the media file."""
        return self.file_name[: self.stem_length]

    @property
    def group(self) -> tuple[int, ...]:
        """Key that is equal for items that can share a batch: table or group of tables, and all sizes."""
        sizes = (*self.bucket, *self.reference_latent_sizes, *self.audio_latent_shape)
        if self.audio_reference_length:
            sizes = (*sizes, self.audio_reference_length)
        return (self.table.batch_group, *sizes)

    @property
    def latent_path(self) -> Path:
        """Path of the item's latent cache file."""
        return self.table.cache_directory / self.file_name

    @property
    def audio_path(self) -> Path:
        """Path of the clip's audio cache file."""
        return self.table.cache_directory / audio_file_name(self.file_name, self.cache_info.tag)

    def caption_path(self, number: int) -> Path:
        """Return the path of a caption's text cache file; `number` EMPTY stands for the empty prompt."""
        name = text_file_name(self.source_stem, self.cache_info.tag, number)
        if number == EMPTY and not self.table.references.are_seen_by_texts:
            name = empty_text_name(self.cache_info.tag)
        return self.table.cache_directory / name


class HasSource(Protocol):
    """Protocol of dataclasses that can be held out for validation: they have a table and a source stem."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def table(self) -> DatasetTable:
        """Table of the dataset file that contains the item."""

    @property
    def source_stem(self) -> str:
        """Stem of the media file; all items of one file are held out for validation together."""


def list_tables(items: Iterable[HasSource]) -> list[DatasetTable]:
    """Return the tables of these items, each once, in the order of the dataset file."""
    by_index = {item.table.index: item.table for item in items}
    return [by_index[index] for index in sorted(by_index)]


def group_items(items: Iterable[TrainingItem]) -> dict[tuple[int, ...], list[TrainingItem]]:
    """Return the items by group key: only items of one group can share a batch."""
    groups: dict[tuple[int, ...], list[TrainingItem]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    return groups


@dataclass(frozen=True)
class CachingCommands:
    """The two caching commands for a dataset file, as a user would type them.

    They are only built when a message shows them.
    """

    build: Callable[[], tuple[str, str]]  # returns the commands for latents and for texts; picklable

    @property
    def latents(self) -> str:
        """The command that caches latents."""
        return self.build()[0]

    @property
    def text(self) -> str:
        """The command that caches texts."""
        return self.build()[1]

    def get(self, is_text: bool) -> str:
        """Return the command that caches texts (`is_text`) or latents."""
        return self.text if is_text else self.latents


def _name_scripts() -> tuple[str, str]:
    """Return placeholder names of the two caching scripts, for messages when the family is unknown."""
    return "the latent caching script", "the text caching script"


NO_COMMANDS = CachingCommands(_name_scripts)
