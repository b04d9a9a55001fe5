"""A store with its entries in few large files: SQLite databases, one for each writer.

Each writer fills its own shard, so that any number of processes may write into a folder. Entries that were
written survive if a process is killed. `tools/convert_cache.py` converts shards to single files.
"""

import contextlib
import io
import logging
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from checkpoints.writing import safetensors_bytes
from dataset.cache.catalog import (
    Catalog,
    EntryRow,
    ShardWriter,
    encode_name,
    explain_sqlite,
    finish_abandoned_shards,
    list_shards,
    open_shard,
)
from dataset.cache_files import Entry, unpack, unpack_header
from dataset.sources.media_source import OLD_INDEXES, SHARD_FILE_NAME
from modules.atomic_write import check_space, remove_leftovers
from modules.errors import CacheError, OutputError
from modules.file_locks import only_one

logger = logging.getLogger(__name__)

T = TypeVar("T")

SHARD_BYTES = 1 << 30  # a shard of at least this size is finished, and the writer starts another one
# a shard is also finished after this time: other machines see only finished shards
SHARD_SECONDS = 300.0
MAX_OPEN = 64  # shards that are open at once
SMALL = 0.5  # fraction of SHARD_BYTES; smaller shards are merged
MAX_HOLES = 0.25  # fraction of a shard's bytes that replaced entries may occupy before it is rewritten
LOCK = ".cache-index.lock"  # exists while shards are merged


class ShardStore:
    """Cache store that keeps its entries in shards: SQLite files with many entries each."""

    holds_only_caches, is_shared = True, False

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self._shard_bytes = shard_bytes
        self._lock = threading.RLock()
        self._catalog: Catalog | None = None
        self._writer: ShardWriter | None = None
        self._opened: dict[str, sqlite3.Connection] = {}
        self._process = os.getpid()
        self._parent_state: object = None  # what a forked process got from its parent

    def __reduce__(self) -> tuple[Any, ...]:
        # without connections, which cannot be pickled: the copy in another process opens its own
        return ShardStore, (self.folder, self._shard_bytes)

    def names(self) -> Collection[str]:
        """Return the names of all entries, including those in shards that were finished meanwhile."""
        with self._lock:
            return self._read_catalog(is_new=True).names()

    def __contains__(self, name: str) -> bool:
        with self._lock:
            row = self._read_catalog().entries.get(name)
            return row is not None and row.size is not None

    def read(self, name: str, is_full: bool = True) -> Entry:
        """Read a cache entry to the CPU, or only its header if `is_full` is False.

        Raises:
            CacheError: If the entry is missing or damaged.
        """
        path = self.folder / name
        if is_full:
            return unpack(path, self.read_bytes(name))

        def read_header(row: EntryRow) -> Entry:
            """Read only the beginning of an entry; from a tar, all of its bytes."""
            connection = self._open(row.shard)
            if connection is None:  # a tar
                data = _read_row(connection, self.folder, row)
                return unpack_header(path, len(data), io.BytesIO(data).read)
            with connection.blobopen("entries", "data", row.position, readonly=True) as blob:
                return unpack_header(path, len(blob), blob.read)

        return self._read_with_retry(name, read_header)

    def read_bytes(self, name: str) -> bytes:
        """Read the bytes of a cache entry: a complete safetensors file.

        Raises:
            CacheError: If the file is missing from the shards or damaged.
        """
        return self._read_with_retry(name, lambda row: _read_row(self._open(row.shard), self.folder, row))

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Append tensors to this process's shard, as the bytes of a safetensors file."""
        self.write_bytes(name, safetensors_bytes(tensors, dict(sorted(metadata.items()))))

    def write_bytes(self, name: str, data: bytes | None) -> None:
        """Write an entry with the bytes of a safetensors file; None marks the entry as removed.

        This process's shard is finished when it is large or old enough; the next write starts another one.

        Raises:
            OutputError: If the entry cannot be written.
        """
        with self._lock:
            catalog = self._read_catalog()
            if self._writer is not None:
                is_old = self._writer.start_time + SHARD_SECONDS < time.monotonic()
                if self._writer.size >= self._shard_bytes or is_old:
                    self._finish()
                    catalog = self._read_catalog()  # finishing has renamed the shard
            if self._writer is None:
                self._writer = ShardWriter(self.folder)
            replaced = catalog.entries.get(name)
            # if an entry has several rows, the one with the highest generation is used
            generation = 0 if replaced is None else replaced.generation + 1
            catalog.entries[name] = self._writer.put(encode_name(name), generation, data)

    def remove(self, name: str) -> None:
        """Mark an entry as removed; its bytes are freed when shards are rewritten."""
        with self._lock:
            if name in self:
                self.write_bytes(name, None)

    def close(self, is_last: bool = False) -> None:
        """Finish this process's shard, so that all written entries survive; later writes start a new shard.

        Args:
            is_last: Whether all writers of a run have finished. Then small shards are merged, and removed and
                damaged entries are deleted.

        Raises:
            OutputError: If the disk is full; no entry is lost.
        """
        with self._lock:
            self._finish()
            if is_last:
                merge_shards(self.folder, self._shard_bytes)

    def _finish(self) -> None:
        """Finish the shard that this process is writing, if any."""
        writer = self._writer
        if writer is not None:
            self._writer = None
            self._discard_catalog()  # the catalog has the shard under its unfinished name
            writer.finish()

    # --- reading ---

    def _read_catalog(self, is_new: bool = False) -> Catalog:
        """Return the index that maps each entry to its shard."""
        # With `is_new`, it includes shards that other processes have finished since it was read.
        if self._process != os.getpid():
            # a forked process must not close its parent's connections: references to them are kept, unused
            self._parent_state = self._writer, self._opened, self._catalog
            self._process = os.getpid()
            self._writer = None
            self._discard_catalog()
        if is_new or self._catalog is None:
            # finish what killed processes left, but not the shard that this process is writing
            own_shard = None if self._writer is None else self._writer.path
            finish_abandoned_shards(self.folder, own_shard)
        if is_new and self._catalog is not None:
            shards = list_shards(self.folder)
            if _finished(shards) != _finished(self._catalog.shard_sizes):
                self._discard_catalog()
        if self._catalog is None:
            self._catalog = Catalog(self.folder, self._writer)
        return self._catalog

    def _discard_catalog(self) -> None:
        """Drop the cached index and the opened shards, because the shards have changed."""
        self._catalog = None
        self._opened = {}

    def _read_with_retry(self, name: str, read: Callable[[EntryRow], T]) -> T:
        """Call `read` with an entry's row and return the result."""
        # If that fails, reload the shards and retry.
        # Another process may have merged the shards since they were listed.
        try:
            return self._read_entry(name, read)
        except CacheError:
            with self._lock:
                self._discard_catalog()
        return self._read_entry(name, read)

    def _read_entry(self, name: str, read: Callable[[EntryRow], T]) -> T:
        """Call `read` with an entry's row and return its result; raise CacheError if this fails."""
        with self._lock:
            row = self._read_catalog().entries.get(name)
        if row is None or row.size is None:
            raise CacheError(f"{self.folder / name}: no such cache file, in none of the shards")
        try:
            return read(row)
        except (sqlite3.Error, OSError) as error:
            raise CacheError(f"{self.folder / name}: cannot be read from {row.shard} ({error})") from None

    def _open(self, shard: str) -> sqlite3.Connection | None:
        """Open a shard for reading; None if it is a tar. It stays open while another thread reads from it."""
        with self._lock:
            if shard.endswith(".tar"):
                return None
            if self._writer is not None and shard == self._writer.path.name:
                return self._writer.connection
            if shard not in self._opened:
                if len(self._opened) >= MAX_OPEN:
                    oldest = next(iter(self._opened))
                    self._opened.pop(oldest)  # closed when no thread reads from it
                self._opened[shard] = open_shard(self.folder / shard)
            return self._opened[shard]


def _finished(shards: Mapping[str, int]) -> dict[str, int]:
    """Return the shards that are not being written, with their sizes in bytes."""
    return {name: size for name, size in shards.items() if not name.endswith(".writing")}


def _read_row(connection: sqlite3.Connection | None, folder: Path, row: EntryRow) -> bytes:
    """Return the bytes of an entry."""
    # `connection` is open on its shard; None for a tar.
    if connection is None:
        with (folder / row.shard).open("rb") as file:
            file.seek(row.position)
            data = file.read(row.size)
    else:
        selected = connection.execute("SELECT data FROM entries WHERE place = ?", (row.position,)).fetchone()
        data = b"" if selected is None else selected[0]  # the checksum of b"" does not match
        if not isinstance(data, bytes):  # SQLite columns take any type
            data = b""
    if zlib.crc32(data) != row.crc32:
        raise CacheError(f"{folder / row.shard}: damaged, the bytes of an entry do not match their checksum")
    return data


# --- tidying a folder
# ------------------------------------------------------------------------------------------------------------


def shard_errors(folder: Path) -> list[str]:
    """Return a line for each unreadable shard in a folder."""
    return Catalog(folder).problems


def merge_shards(folder: Path, shard_bytes: int = SHARD_BYTES, with_tars: bool = False) -> None:
    """Merge the small shards of a folder, and rewrite damaged shards and those with many replaced entries.

    Only one process at a time does this. Shards that other processes are writing do not change. With
    `with_tars`, tar shards of earlier versions are converted to SQLite files.

    Raises:
        OutputError: If the disk is full; no entry is lost.
    """
    if not folder.is_dir():
        return
    with explain_sqlite(folder), only_one(folder / LOCK):
        remove_leftovers(folder, lambda name: SHARD_FILE_NAME.fullmatch(name) is not None)
        finish_abandoned_shards(folder)
        for name in OLD_INDEXES:
            (folder / name).unlink(missing_ok=True)
        catalog = Catalog(folder)
        live_bytes = catalog.count_live_bytes()
        max_small_bytes = shard_bytes * SMALL
        small_shards = {name for name in catalog.stored_bytes if catalog.shard_sizes[name] < max_small_bytes}
        shards_to_rewrite = set(catalog.damaged_shards)
        for name, stored_bytes in catalog.stored_bytes.items():
            if live_bytes[name] < stored_bytes * (1 - MAX_HOLES):  # replaced entries take too much space
                shards_to_rewrite.add(name)
        if with_tars:
            shards_to_rewrite |= {name for name in catalog.shard_sizes if name.endswith(".tar")}
        if len(small_shards) > 1 or shards_to_rewrite:  # a single small shard is the last one of a run
            _rewrite(folder, catalog, small_shards | shards_to_rewrite, shard_bytes)


def _rewrite(folder: Path, catalog: Catalog, shards: Collection[str], shard_bytes: int) -> None:
    """Copy the valid entries of some shards to new shards, then remove the old shards."""
    # After an error, the old shards stay. If the process is killed, every entry is in one shard or in two.
    live_bytes = catalog.count_live_bytes()
    # the file name does not matter, only its disk
    check_space(folder / "cache", sum(live_bytes[name] for name in shards))
    rows = [(name, row) for name, row in sorted(catalog.entries.items()) if row.shard in shards]
    with contextlib.closing(_read_valid_entries(folder, rows)) as entries:
        _write_shards(folder, entries, shard_bytes)
    for shard in shards:
        with contextlib.suppress(PermissionError):  # Windows: someone reads it
            (folder / shard).unlink(missing_ok=True)


class _CopiedEntry(NamedTuple):
    """An entry that is copied to a new shard."""

    name: str
    generation: int
    data: bytes | None  # None if the entry was removed: another shard of the folder may still have it


def _read_valid_entries(
    folder: Path, rows: Iterable[tuple[str, EntryRow]]
) -> Generator[_CopiedEntry, None, None]:
    """Read the entries of these rows from their shards; damaged ones are skipped with a warning."""
    connections: dict[str, sqlite3.Connection] = {}
    try:
        for name, row in rows:
            if not row.shard.endswith(".tar") and row.shard not in connections:
                connections[row.shard] = open_shard(folder / row.shard)
            try:
                data = _read_to_copy(connections.get(row.shard), folder, row)
            except CacheError as error:
                path = folder / row.shard
                logger.warning("%s: an entry is damaged; cache again to replace it (%s)", path, error)
                continue
            yield _CopiedEntry(name, row.generation, data)
    finally:
        for connection in connections.values():
            connection.close()


def _write_shards(folder: Path, entries: Iterable[_CopiedEntry], shard_bytes: int) -> None:
    """Write entries to new shards of about `shard_bytes`; after an error, an unfinished shard is removed."""
    writer: ShardWriter | None = None
    try:
        for entry in entries:
            if writer is not None and writer.size >= shard_bytes:
                writer.finish()
                writer = None
            writer = writer or ShardWriter(folder)
            writer.put(encode_name(entry.name), entry.generation, entry.data)
        if writer is not None:
            writer.finish()
    except BaseException:
        if writer is not None:
            writer.connection.close()
            writer.path.unlink(missing_ok=True)  # a finished shard has another path and stays
        raise


def _read_to_copy(connection: sqlite3.Connection | None, folder: Path, row: EntryRow) -> bytes | None:
    """Return the bytes of an entry, to copy them; None if it was removed."""
    if row.size is None:
        return None
    try:
        return _read_row(connection, folder, row)
    except sqlite3.OperationalError as error:
        raise OutputError(f"{folder / row.shard} cannot be read: {error}. Run this again") from error
    except sqlite3.DatabaseError as error:
        raise CacheError(str(error)) from error
