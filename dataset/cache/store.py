"""Where the entries of a cache folder are kept: reading, writing and removing them by their names.

An entry has the name of a single cache file (see files.py), whatever holds it. Messages name it as
`folder/name`.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor

from dataset.cache.files import Entry, Header, read_entry, read_header, write_tensors
from dataset.cache.npz import NpzNames, open_npz
from dataset.cache.shards import ShardStore
from dataset.config import DatasetTable
from modules.atomic_write import remove_leftovers
from modules.errors import DatasetError

Stamp = tuple[int, int]  # size in bytes, and when it was last written, in nanoseconds since 1970


class CacheStore(Protocol):
    """The entries of one cache folder. An entry is there whole or not at all, and may be used by several
    threads at once; other processes may write others of the same folder meanwhile.
    """

    @property
    def folder(self) -> Path:
        """Return the cache folder, there or not."""
        ...

    @property
    def holds_only_caches(self) -> bool:
        """Return whether all names are those of caches, so that a damaged one may be removed."""
        ...

    def is_shared(self, name: str) -> bool:
        """Return whether other programs keep it too: theirs counts if it fits, and it is never stale."""
        ...

    def names(self) -> Collection[str]:
        """Return the names of all entries, and of other files that lie beside them."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is an entry of this name."""
        ...

    def stamp(self, name: str) -> Stamp | None:
        """Return values that change with the bytes of an entry, unread; None if it is not there, or has to be
        read to know.
        """
        ...

    def read_header(self, name: str) -> Header:
        """Read metadata and tensor names. Raises CacheError if the entry is missing or damaged."""
        ...

    def read(self, name: str) -> Entry:
        """Read an entry to the CPU. Raises CacheError if it is missing or damaged."""
        ...

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write an entry, in place of one of the same name. tensors: by their names in the file.

        Equal contents give equal bytes. Raises OutputError.
        """
        ...

    def replace(
        self, old: str, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        """Write an entry in place of another, of another name. Raises OutputError."""
        ...

    def remove(self, name: str) -> None:
        """Remove an entry, if it is there."""
        ...

    def sweep(self, of: Callable[[str], bool]) -> None:
        """Remove leftovers of killed writers for fitting names, not files that another process writes."""
        ...

    def finish(self) -> None:
        """Make sure that all that was written survives, as the last act of a writer; more may follow."""
        ...

    def settle(self) -> None:
        """Put the store in order when the writers of a run have finished: the act of one process.

        Raises OutputError if there is no room for it; nothing is lost then.
        """
        ...

    def faults(self) -> list[str]:
        """Return the faults of the store as a whole, by which entries may be missing."""
        ...


@dataclass(frozen=True)
class SingleFiles:
    """A file for each entry: the form that existing tuners read and write."""

    folder: Path
    holds_only_caches: ClassVar[bool] = False

    def is_shared(self, name: str) -> bool:
        return False

    def names(self) -> Collection[str]:
        # not `iterdir`: a Path for each name takes longer than all else; a list, as a set takes as long again
        return os.listdir(self.folder) if self.folder.is_dir() else []

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def stamp(self, name: str) -> Stamp | None:
        try:
            found = os.stat(f"{self.folder}/{name}")  # noqa: PTH116  # a Path would take longer
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns

    def read_header(self, name: str) -> Header:
        return read_header(self.folder / name)

    def read(self, name: str) -> Entry:
        return read_entry(self.folder / name)

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        write_tensors(self.folder / name, tensors, metadata)

    def replace(
        self, old: str, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        self.write(name, tensors, metadata)  # first: another process may need the old one until then
        self.remove(old)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def sweep(self, of: Callable[[str], bool]) -> None:
        if self.folder.is_dir():
            remove_leftovers(self.folder, of)

    def finish(self) -> None:
        """Do nothing: each file is flushed when it is written."""

    def settle(self) -> None:
        """Do nothing: files stay as they are."""

    def faults(self) -> list[str]:
        return []


def open_store(table: DatasetTable, names: NpzNames | None = None) -> CacheStore:
    """Return the store of a table's cache folder, in the form that `cache_format` says.

    names: of the family in npz files. Raises DatasetError if it has none and the form is npz.
    """
    if table.cache_format == "npz":
        if names is None or names.latent.npz is None:
            raise DatasetError(
                f'{table.name}: cache_format = "npz": this model has no caches in npz files. Use "files" or '
                '"shards"'
            )
        return open_npz(table, names, table.cache_directory)
    if table.cache_format == "shards":
        return ShardStore(table.cache_directory)
    return SingleFiles(table.cache_directory)


@dataclass
class Stores:
    """The stores of a run's tables, each opened when it is first asked for.

    It is copied into the processes that read batches, so stores can be pickled.
    """

    names: NpzNames | None = None  # of the family in npz files; None: no table has any
    # of tables whose caches are elsewhere than their cache_format says, by index
    given: Mapping[int, CacheStore] = field(default_factory=dict)
    _opened: dict[tuple[int, Path], CacheStore] = field(default_factory=dict)

    def of(self, table: DatasetTable) -> CacheStore:
        """Return the store of a table. Raises as `open_store`."""
        if table.index in self.given:
            return self.given[table.index]
        key = table.index, table.cache_directory
        if key not in self._opened:
            self._opened[key] = open_store(table, self.names)
        return self._opened[key]

    def finish(self, tables: Iterable[DatasetTable]) -> None:
        """Finish the stores of these tables, as the last act of a writer."""
        for table in tables:
            self.of(table).finish()

    def settle(self, tables: Iterable[DatasetTable]) -> None:
        """Put the stores of these tables in order, when all writers of the run have finished."""
        for table in tables:
            self.of(table).settle()
