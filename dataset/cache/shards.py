"""A store that keeps its entries in few large files: SQLite databases, one for each writer.

Each writer fills a shard of its own, so that any number may write into a folder. A kill or a power cut costs
at most what was written in the last quarter of a second. `tools/convert_cache.py` turns shards into files.
"""

import contextlib
import io
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from dataset.cache.catalog import Catalog, CatalogRow, address, connect, encode_name, list_shards
from dataset.cache.files import Entry, Header, unpack, unpack_header
from dataset.cache.shard_files import SHARD_BYTES, ShardWriter, explain_sqlite, merge_shards, read_row
from modules.checkpoints.writing import safetensors_bytes
from modules.errors import CacheError, OutputError

T = TypeVar("T")

# a writer begins another shard: others read a killed writer's one only if they see that it is dead
SHARD_SECONDS = 300.0
COMMIT_SECONDS = 0.25
MOST_OPEN = 64  # shards at once


class ShardStore:
    """The entries of a folder of shards, as `CacheStore` describes them."""

    holds_only_caches = True

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self._shard_bytes = shard_bytes
        self._lock = threading.RLock()
        self._catalog: Catalog | None = None
        self._added: dict[str, CatalogRow] = {}  # in place of those of the catalog
        self._writer: ShardWriter | None = None
        self._timer: threading.Timer | None = None
        self._committed = 0.0  # when
        self._failure: OutputError | None = None  # of the timer
        self._opened: dict[str, sqlite3.Connection] = {}
        self._process = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy in another process opens files of its own
        return ShardStore, (self.folder, self._shard_bytes)

    def is_shared(self, name: str) -> bool:
        """Return False: no other program writes into shards."""
        return False

    def names(self) -> Collection[str]:
        """Return the names of all entries, with the latest ones that other writers have finished."""
        with self._lock:
            found = self._look(is_new=True).names()
            if self._added:
                found = [name for name in found if name not in self._added]
                found += [name for name, row in self._added.items() if row.size is not None]
            return found

    def __contains__(self, name: str) -> bool:
        """Whether there is an entry of that name, whole, damaged or lost."""
        with self._lock:
            row = self._row(name)
            return row is not None and row.size is not None

    def read(self, name: str, is_whole: bool = True) -> Entry:
        """Read an entry to the CPU. Raises CacheError if it is missing or damaged."""
        path = self.folder / name
        if is_whole:
            return unpack(path, self.read_bytes(name))

        def read_header(row: CatalogRow) -> Header:
            rows = self._open(row)
            if rows is None:
                data = read_row(rows, self.folder, row)
                return unpack_header(path, len(data), io.BytesIO(data).read)
            with rows.blobopen("entries", "data", row.place, readonly=True) as blob:
                return unpack_header(path, len(blob), blob.read)

        return Entry(self._with_row(name, read_header), {})

    def read_bytes(self, name: str) -> bytes:
        """Read the bytes of an entry's file. Raises CacheError if it is missing or damaged."""

        def read(row: CatalogRow) -> bytes:
            data = read_row(self._open(row), self.folder, row)
            if zlib.crc32(data) != row.crc32:
                raise CacheError(
                    f"{self.folder / name}: damaged, its bytes in {row.shard} do not match their checksum"
                )
            return data

        return self._with_row(name, read)

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write an entry, in place of one of the same name. Raises OutputError."""
        self.write_bytes(name, safetensors_bytes(tensors, dict(sorted(metadata.items()))))

    def write_bytes(self, name: str, data: bytes | None) -> None:
        """Write an entry that is the bytes of a file; None: remove it. Raises OutputError."""
        with self._lock:
            self._raise_failure()
            old, writer = self._row(name), self._writer
            if writer is not None and (
                writer.size >= self._shard_bytes or writer.began + SHARD_SECONDS < time.monotonic()
            ):
                self._finish()
            if self._writer is None:
                self._writer = ShardWriter(self.folder)
            writer, row_name = self._writer, encode_name(name)
            generation = 0 if old is None else old.generation + 1
            is_only_here = old is not None and generation == 1 and old.shard == writer.path.name
            try:
                with explain_sqlite(writer.path):
                    if data is None and is_only_here:  # no other shard knows it
                        writer.rows.execute("DELETE FROM entries WHERE name = ?", (row_name,))
                        place = 0
                    else:
                        place = writer.put(row_name, generation, data)
                    self._commit_in_time(writer)
            except BaseException:
                self._give_up()
                raise
            size, crc32 = (None, 0) if data is None else (len(data), zlib.crc32(data))
            self._added[name] = CatalogRow(writer.path.name, place, generation, size, crc32)

    def remove(self, name: str) -> None:
        """Remove an entry, if it is there."""
        with self._lock:
            if name in self:
                self.write_bytes(name, None)

    def close(self, is_last: bool = False) -> None:
        """Make sure that all that was written survives; more begins another shard.

        is_last: all writers of a run have finished. Then small shards are merged, removed and damaged entries
        are reclaimed, and the index is written. Raises OutputError if there is no room for it; nothing is
        lost then.
        """
        with self._lock:
            self._raise_failure()
            self._finish()
            if is_last:
                self._forget()
                merge_shards(self.folder, self._shard_bytes)

    def _commit_in_time(self, writer: ShardWriter) -> None:
        """Commit at most four times a second: each waits for the disk."""
        left = self._committed + COMMIT_SECONDS - time.monotonic()
        if left <= 0:
            writer.rows.execute("COMMIT")
            self._committed = time.monotonic()
        elif self._timer is None:
            self._timer = threading.Timer(left, self._commit_later)
            self._timer.daemon = True
            self._timer.start()

    def _commit_later(self) -> None:
        with self._lock:
            self._timer = None
            if self._writer is None or not self._writer.rows.in_transaction:
                return
            try:
                with explain_sqlite(self._writer.path):
                    self._writer.rows.execute("COMMIT")
                self._committed = time.monotonic()
            except OutputError as error:
                self._failure = error
                self._give_up()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _give_up(self) -> None:
        """Finish the shard with what was committed, after an error."""
        assert self._writer is not None
        with contextlib.suppress(sqlite3.Error):
            self._writer.rows.execute("ROLLBACK")
        with contextlib.suppress(OutputError):
            self._finish()
        self._writer = None
        self._forget()

    def _finish(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            before, after = writer.path.name, writer.finish().name
            for name, row in self._added.items():
                if row.shard == before:
                    self._added[name] = row._replace(shard=after)

    # --- reading ---

    def _look(self, is_new: bool = False) -> Catalog:
        if self._process != os.getpid():  # what a forked process inherits is its parent's
            self._process, self._opened, self._catalog = os.getpid(), {}, None
        if self._catalog is None or (is_new and list_shards(self.folder) != self._catalog.shards):
            self._catalog = Catalog(self.folder)
            writes = None if self._writer is None else self._writer.path.name
            self._added = {name: row for name, row in self._added.items() if row.shard == writes}
        return self._catalog

    def _forget(self) -> None:
        self._catalog = None
        self._added.clear()
        self._opened.clear()

    def _row(self, name: str) -> CatalogRow | None:
        catalog = self._look()
        return self._added.get(name) or catalog.get(name)

    def _with_row(self, name: str, read: Callable[[CatalogRow], T]) -> T:
        """Read an entry; if that fails look again, since shards may have been merged meanwhile."""
        for is_last in (False, True):
            with self._lock:
                row = self._row(name)
            if row is None or row.size is None:
                error = CacheError(f"{self.folder / name}: no such cache file, in none of the shards")
            elif row.shard is None:
                error = CacheError(f"{self.folder / name}: damaged, its shard was cut or removed")
            else:
                try:
                    return read(row)
                except CacheError as failure:
                    error = failure
                except (sqlite3.Error, OSError) as failure:
                    error = CacheError(f"{self.folder / name}: cannot be read from {row.shard} ({failure})")
            if is_last:
                raise error
            with self._lock:
                self._opened.clear()
                self._look(is_new=True)
        raise AssertionError("unreachable")

    def _open(self, row: CatalogRow) -> sqlite3.Connection | None:
        """Return an open shard; None of a tar. Another thread that still reads from one keeps it open."""
        assert row.shard is not None
        with self._lock:
            if row.shard.endswith(".tar"):
                return None
            if self._writer is not None and row.shard == self._writer.path.name:
                return self._writer.rows
            found = self._opened.get(row.shard)
            if found is None:
                if len(self._opened) >= MOST_OPEN:
                    self._opened.pop(next(iter(self._opened)))
                found = self._opened[row.shard] = connect(address(self.folder / row.shard))
            return found
