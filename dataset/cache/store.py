"""Stores of cache entries, which read, write and remove entries by their names.

An entry has the name of a single cache file (see dataset/cache_files.py) in all stores. Messages name it as
`folder/name`.
"""

import logging
import os
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

from torch import Tensor

from dataset.cache.form import list_format_errors
from dataset.cache_files import (
    CacheStore,
    Entry,
    LatentName,
    NpzNames,
    is_cache_name,
    latent_names,
    read_entry,
    write_tensors,
)
from dataset.forms.composing import SHARED_CACHES, get_source_format
from dataset.sources.media_source import SHARD_FILE_NAME
from dataset.table import DatasetTable
from modules.atomic_write import remove_leftovers, write_bytes
from modules.errors import CacheError, DatasetError
from protocols.family import Caches

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SingleFiles:
    """Cache store with one safetensors file per entry, the format that other trainers read and write."""

    folder: Path
    holds_only_caches: ClassVar[bool] = False
    is_shared: ClassVar[bool] = False

    def names(self) -> Collection[str]:
        """Return the file names in the cache folder; [] if the folder does not exist."""
        # not `iterdir`, because creating a Path for each name takes longer than listing; not a set, because
        # building it takes as long as listing
        return os.listdir(self.folder) if self.folder.is_dir() else []

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).exists()

    def read(self, name: str, is_full: bool = True) -> Entry:
        """Read a file, or only its header if `is_full` is False."""
        path = f"{self.folder}{os.sep}{name}"  # a Path would take longer
        return read_entry(path, is_full)

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a file atomically: it is complete or missing, even if the process is killed."""
        write_tensors(self.folder / name, tensors, metadata)

    def read_bytes(self, name: str) -> bytes:
        """Read all bytes of a file.

        Raises:
            CacheError: If the file cannot be read.
        """
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise CacheError(f"{self.folder / name}: cannot be read ({error.strerror})") from error

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write these bytes to the file `name`. Raises OutputError if it cannot be written."""
        write_bytes(self.folder / name, data)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        (self.folder / name).unlink(missing_ok=True)

    def close(self, is_last: bool = False) -> None:
        """Remove unfinished files of killed processes; complete files were flushed when written."""
        if is_last and self.folder.is_dir():
            remove_leftovers(self.folder, is_cache_name)


@dataclass(frozen=True)
class MemoryStore:
    """Cache store that keeps its entries in memory. Reading copies nothing: do not change returned tensors.

    Only the training process reads from it; it is not sent to worker processes.
    """

    folder: Path  # for messages
    entries: dict[str, Entry] = field(default_factory=dict)
    holds_only_caches: ClassVar[bool] = True
    is_shared: ClassVar[bool] = False

    def names(self) -> Collection[str]:
        """Return the names of all entries in memory."""
        return list(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(self, name: str, is_full: bool = True) -> Entry:
        """Return an entry from memory, always with its tensors."""
        if name not in self.entries:
            raise CacheError(f"{self.folder / name}: it is not in memory")
        return self.entries[name]

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Keep copies of the tensors in host memory under this name."""
        # copies, because the output of an encoder may be a view of a larger tensor
        named = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        self.entries[name] = Entry.of(self.folder / name, dict(metadata), named)

    def remove(self, name: str) -> None:
        """Remove an entry from memory, if it exists."""
        self.entries.pop(name, None)

    def close(self, is_last: bool = False) -> None:
        """Do nothing: no entry survives the process."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors in memory."""
        return sum(tensor.nbytes for entry in self.entries.values() for tensor in entry.named.values())


def open_store(table: DatasetTable, names: NpzNames | None = None) -> CacheStore:
    """Open the store of a table's cache folder, in the format that its `cache_format` names.

    `names` are the family's names in npz files, which the format npz requires.

    Raises:
        DatasetError: If the format is npz but the family has no npz names.
    """
    if table.cache_format == "files":
        return SingleFiles(table.cache_directory)
    if table.cache_format == "shards":
        from dataset.cache.shards import ShardStore

        return ShardStore(table.cache_directory)
    return open_shared(table, names, table.cache_format, table.cache_directory)


def open_shared(table: DatasetTable, names: NpzNames | None, cache_format: str, folder: Path) -> CacheStore:
    """Open a store of caches that are shared with other trainers, in one of the formats `SHARED_CACHES`.

    Args:
        table: Table of the dataset file.
        names: The family's names in npz files.
        cache_format: A key of SHARED_CACHES.
        folder: Folder of the caches. If a list names the images, their caches are next to them instead.

    Raises:
        DatasetError: If the family has no caches in this format.
    """
    return SHARED_CACHES[cache_format].open_store(table, names, folder, partial(_list_images, table))


def _list_images(table: DatasetTable) -> dict[str, Path]:
    """Return the paths without suffix, by stem, of the images that a list names."""
    # Returns {} if the table's images are all in its folder.
    if not get_source_format(table).names_images_anywhere:
        return {}
    from dataset.listing import find_sources  # only for shared caches of lists

    sources = find_sources(table, captions=False, faults=[])
    return {source.stem: source.path.with_suffix("") for source in sources}


def may_have_both_formats(table: DatasetTable, names: Collection[str] | None = None) -> bool:
    """Return whether a table may have both single cache files and shards; `cache_format` names only one.

    `names` are the names in the table's cache folder, if they have been listed.
    """
    folder = table.cache_directory
    if table.cache_format == "shards":
        return True
    if table.cache_format != "files":  # files next to shared caches may belong to another training run
        return False
    if names is None:
        names = os.listdir(folder) if folder.is_dir() else ()
    return any(map(SHARD_FILE_NAME.fullmatch, names))


def npz_names(family: Caches) -> NpzNames:
    """Return the facts about a family that determine the names of npz files and their arrays."""
    has_npz = family.latent.npz is not None
    # text_keys is not read without need, because for some families it requires options for all encoders
    return NpzNames(family.cache_tag, family.latent, family.text_keys if has_npz else frozenset())


class NewCaption(NamedTuple):
    """A caption that replaces those of an item, and the text cache with its outputs."""

    text: str
    path: Path | None  # None: captions are encoded in each step


class StorePair(NamedTuple):
    """A table's store for latents and its store for text embeddings."""

    latents: CacheStore
    texts: CacheStore


@dataclass
class Stores:
    """The cache stores of a run's tables, each opened when it is first needed.

    Stores are sent to the worker processes that read batches, so they can be pickled.
    """

    names: NpzNames | None = None  # the family's names in npz files; None: no table has npz files
    # stores by table index, for tables whose entries are not where their cache_format says
    custom_stores: Mapping[int, StorePair] = field(default_factory=dict)
    trusts_shared_caches: bool = False  # existing shared files count as valid without being read
    skip_existing: bool = False  # entries without a record are valid if their size or caption matches
    verify: bool = False  # read all values to compare entries, no matter how many entries there are
    # captions that replace those of the caches while a run trains, by table index and stem of the source
    new_captions: "dict[tuple[int, str], NewCaption]" = field(default_factory=dict)
    _opened: dict[tuple[int, Path], CacheStore] = field(default_factory=dict)  # by table index and folder

    def latent_store(self, table: DatasetTable) -> CacheStore:
        """Return the store for a table's latents.

        Raises:
            DatasetError: If the table's format is npz but the family has no npz names.
        """
        if table.index in self.custom_stores:
            return self.custom_stores[table.index].latents
        key = table.index, table.cache_directory
        if key not in self._opened:
            self._opened[key] = open_store(table, self.names)
        return self._opened[key]

    def text_store(self, table: DatasetTable) -> CacheStore:
        """Return the store for a table's text embeddings; it is usually the one for its latents, too."""
        if table.index in self.custom_stores:
            return self.custom_stores[table.index].texts
        return self.latent_store(table)

    def require_declared_formats(self, tables: Iterable[DatasetTable], tag: str) -> None:
        """Raise DatasetError if a table has caches in another format than its `cache_format`.

        `tag` is the family's cache_tag.
        """
        own_folders = [table for table in tables if table.index not in self.custom_stores]
        to_check = [table for table in own_folders if may_have_both_formats(table)]
        if to_check:
            errors = [line for table in to_check for line in list_format_errors(table, tag)]
            if errors:
                raise DatasetError("\n".join(errors))

    def close(self, tables: Iterable[DatasetTable], is_last: bool = False) -> None:
        """Close these tables' stores, so that no written entry can be lost."""
        for table in tables:
            latents, texts = self.latent_store(table), self.text_store(table)
            latents.close(is_last)
            if texts is not latents:
                texts.close(is_last)


# --- caches of latents by their sources
# ------------------------------------------------------------------------------------------------------------

# the latent cache files of one source: file name -> parsed name without the stem
Names = Mapping[str, LatentName]


class LatentNames:
    """Latent cache files of one table, by the stem of the image or clip that they were made from.

    A table may have millions of files, so each distinct name ending (what follows the stem) is stored only
    once.
    """

    def __init__(self, store: CacheStore, tag: str, kind: str) -> None:
        """Collect the names of the latent caches without opening any.

        `kind` is the table's kind, "image" or "video".
        """
        self._endings: dict[str, LatentName] = {}  # parsed name by ending
        self._files: dict[str, tuple[str, ...]] = {}  # file names by stem; most stems have one
        for file, stem, ending in latent_names(store.names(), tag, kind):
            self._endings.setdefault(file[len(stem) :], ending)
            self._files[stem] = (*self._files.get(stem, ()), file)

    def of(self, stem: str) -> Names:
        """Return the latent cache files of a stem, with their parsed names."""
        return {file: self._endings[file[len(stem) :]] for file in self._files.get(stem, ())}

    def list_stale(self, valid: Container[str], failed: Container[str]) -> list[str]:
        """Return the cache files to remove, sorted by stem: not in `valid`, and not of a stem in `failed`."""
        stale = []
        for stem, files in self._files.items():
            if stem not in failed:
                stale += [(stem, file) for file in files if file not in valid]
        return [file for _, file in sorted(stale)]


ExistingNames = Mapping[int, LatentNames]  # by table index


def remove_caches(store: CacheStore, names: Iterable[str], is_cache: Callable[[Entry], bool]) -> int:
    """Remove caches whose media file is gone, and return how many were removed.

    Nothing is removed from a store that is shared with other trainers.

    Args:
        store: Store with the cache files.
        names: Names of caches without a media file, listed before the run listed its media.
        is_cache: Returns whether a header belongs to a cache, not to another safetensors file.
    """
    if store.is_shared:
        return 0
    num_removed = 0
    for name in names:
        try:
            is_removable = is_cache(store.read(name, is_full=False))
        except CacheError as error:
            if name not in store:  # another process has just removed it
                continue
            is_removable = store.holds_only_caches
            if not is_removable:
                logger.warning(
                    "%s. No item uses it, but it is kept because it may not be a cache file.", error
                )
        if is_removable:
            store.remove(name)
            num_removed += 1
    return num_removed
