"""A store that keeps its entries in few large files: plain tars, whose members are single cache files.

Each writer appends to a shard of its own, so that any number may write into one folder, and a kill costs at
most the entry that was being written. `tar xf` turns a shard back into the files that other tuners read.
"""

import os
import secrets
import threading
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from dataset.cache.catalog import Catalog, CatalogRow, Shard, list_shards, open_catalog
from dataset.cache.files import Entry, Header
from dataset.cache.merging import SHARD_BYTES, merge_shards
from dataset.cache.packing import unpack, unpack_header
from dataset.cache.tar_records import END, RecordKind, padded, record_header, writer_header
from modules.atomic_write import check_space, explain_errors, flush_folder, temporary_name
from modules.checkpoints.writing import safetensors_bytes
from modules.errors import CacheError
from modules.file_locks import try_lock

FLUSH_BYTES = 1 << 26  # a power cut costs no more than this; a kill costs nothing
_MOST = (1 << 63) - 1  # of a signed number
MOST_OPEN = 64  # shards at once


class ShardWriter:
    """The shard that a process appends to. It is locked until it is finished, so that nobody merges it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"cache-{secrets.token_hex(8)}.tar"
        with explain_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            # it gets its name when it says who writes it: a kill leaves no shard that nobody dares to remove
            first = self.path if os.name == "nt" else temporary_name(self.path)
            self._file = first.open("xb", buffering=0)
            try_lock(self._file)
            self.size = self._flushed = 0
            try:
                self.append(writer_header(), b"")
            except BaseException:
                self._file.close()
                first.unlink()
                raise
            if first != self.path:  # Windows renames no open file
                first.rename(self.path)
            flush_folder(folder)

    def append(self, header: bytes, data: bytes) -> int:
        """Append a record, whole or not at all; return the place of its data. Raises OutputError."""
        record = header + data + bytes(padded(len(data)) - len(data))
        with explain_errors(self.path):
            check_space(self.path, len(record))
            try:
                self._write(record)
            except BaseException:
                self._file.truncate(self.size)
                self._file.seek(self.size)
                raise
            self.size += len(record)
            if self.size - self._flushed > FLUSH_BYTES:
                os.fsync(self._file.fileno())
                self._flushed = self.size
        return self.size - len(record) + len(header)

    def finish(self) -> None:
        """Mark the shard as whole, flush it and release it."""
        with explain_errors(self.path):
            try:
                self._write(END)
                os.fsync(self._file.fileno())
            finally:
                self._file.close()

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]


class ShardStore:
    """The entries of a folder of shards, as `CacheStore` describes them."""

    holds_only_caches = True

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self._shard_bytes = shard_bytes
        self._lock = threading.RLock()
        self._catalog: Catalog | None = None
        self._writer: ShardWriter | None = None
        self._handles: dict[str, BinaryIO] = {}

    def is_shared(self, name: str) -> bool:
        """Return False: no other program writes into shards."""
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy in another process opens files of its own
        return ShardStore, (self.folder, self._shard_bytes)

    def names(self) -> Collection[str]:
        """Return the names of all entries, with the latest ones of other writers."""
        with self._lock:
            return self._refresh().names()

    def has(self, name: str) -> bool:
        """Whether there is an entry of this name, be it damaged."""
        with self._lock:
            return self._look().there(name) is not None

    def stamp(self, name: str) -> tuple[int, int] | None:
        """Return values that change with the bytes of an entry, and its shard's time, unread."""
        with self._lock:
            catalog = self._look()
            row = catalog.there(name)
            if row is None or row.kind is RecordKind.LOST:
                return None
            path = self.folder / catalog.shards[row.shard].name
        try:
            changed_ns = path.stat().st_mtime_ns
        except OSError:
            return None
        return (row.length << 32 | row.crc32) & _MOST, changed_ns

    def read_header(self, name: str) -> Header:
        """Read metadata and tensor names. Raises CacheError if the entry is missing or damaged."""
        return self._with_row(name, self._header_of)

    def read(self, name: str) -> Entry:
        """Read an entry to the CPU. Raises CacheError if it is missing or damaged."""
        return unpack(self.folder / name, self.read_bytes(name))

    def read_bytes(self, name: str) -> bytes:
        """Read the bytes of an entry's file. Raises CacheError if it is missing or damaged."""
        return self._with_row(name, self._bytes_of)

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write an entry, in place of one of the same name. Raises OutputError."""
        self.write_bytes(name, safetensors_bytes(tensors, dict(sorted(metadata.items()))))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write an entry that is the bytes of a file. Raises OutputError."""
        self._append(name, RecordKind.ENTRY, data)

    def replace(
        self, old: str, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        """Write an entry in place of another, of another name. Raises OutputError."""
        self.write(name, tensors, metadata)
        self.remove(old)

    def remove(self, name: str) -> None:
        """Remove an entry, if it is there."""
        if self.has(name):
            self._append(name, RecordKind.REMOVED)

    def sweep(self, of: Callable[[str], bool]) -> None:
        """Do nothing: leftovers of killed writers go when the shards are merged."""

    def finish(self) -> None:
        """End the shard that was appended to, as the last act of a writer; more begins another one."""
        with self._lock:
            if self._writer is not None:
                writer, self._writer = self._writer, None
                writer.finish()

    def settle(self) -> None:
        """Merge small shards, reclaim removed and damaged entries, and write the index."""
        self.finish()
        with self._lock:
            self._forget()
            merge_shards(self.folder, self._shard_bytes)

    def faults(self) -> list[str]:
        """Return the faults of the folder as a whole: shards that are cut, damaged or unfinished."""
        with self._lock:
            catalog = self._refresh()
        said = []
        for shard in catalog.shards:
            path = self.folder / shard.name
            said += [f"{path} is damaged at bytes {one.start} to {one.end}" for one in shard.damaged]
            if shard.is_foreign:
                said.append(
                    f"{path} is no shard, or one of another version of this program. It is left alone: "
                    "move it out of the folder, or use the other version"
                )
            elif not shard.is_finished:
                said.append(f"{path} has no end: it was cut, or caching was stopped, or is still running")
        lost = catalog.lost()
        if lost:
            said.append(
                f"{self.folder}: shards were cut or removed, and {len(lost)} entries with them, such as "
                f"{lost[0]}"
            )
        return said

    def _append(self, name: str, kind: RecordKind, data: bytes = b"") -> None:
        with self._lock:
            catalog = self._look()
            old = catalog.get(name)
            generation = 0 if old is None else old.generation + 1
            crc32 = zlib.crc32(data)
            if self._writer is not None and self._writer.size >= self._shard_bytes:
                self.finish()
            if self._writer is None:
                self._writer = ShardWriter(self.folder)
            offset = self._writer.append(record_header(name, kind, generation, len(data), crc32), data)
            number = self._number(catalog, self._writer.path.name)
            shard = catalog.shards[number]
            shard.size = shard.position = self._writer.size
            catalog.added[name] = CatalogRow(number, offset, len(data), crc32, generation, kind)

    def _number(self, catalog: Catalog, name: str) -> int:
        for number in range(len(catalog.shards) - 1, -1, -1):
            if catalog.shards[number].name == name:
                return number
        catalog.shards.append(Shard(name, size=0, position=0, is_finished=False))
        return len(catalog.shards) - 1

    def _look(self) -> Catalog:
        if self._catalog is None:
            self._catalog = open_catalog(self.folder)
        return self._catalog

    def _refresh(self) -> Catalog:
        if self._catalog is not None:
            sizes = list_shards(self.folder)
            if self._catalog.fits(sizes):
                self._catalog.grow(self.folder, sizes)
            else:
                self._forget()
        return self._look()

    def _forget(self) -> None:
        self._catalog = None
        self._handles.clear()

    def _with_row(self, name: str, read: Callable[[str, Path, CatalogRow], Any]) -> Any:
        """Read an entry; if that fails look again, since shards may have been merged meanwhile."""
        for is_last in (False, True):
            with self._lock:
                catalog = self._look()
                row = catalog.there(name)
                shard = "" if row is None or row.kind is RecordKind.LOST else catalog.shards[row.shard].name
            if row is None:
                error = CacheError(f"{self.folder / name}: no such cache file, in none of the shards")
            elif row.kind is RecordKind.LOST:
                error = CacheError(f"{self.folder / name}: damaged, its shard was cut or removed")
            else:
                try:
                    return read(name, self.folder / shard, row)
                except (CacheError, OSError) as failure:
                    error = CacheError(
                        str(failure)
                        if isinstance(failure, CacheError)
                        else f"{self.folder / name}: cannot be read from {shard} ({failure})"
                    )
            if is_last:
                raise error
            with self._lock:
                self._handles.clear()
                self._refresh()
        raise AssertionError("unreachable")

    def _bytes_of(self, name: str, shard: Path, row: CatalogRow) -> bytes:
        data = self._read_at(shard, row.offset, row.length)
        if len(data) != row.length or zlib.crc32(data) != row.crc32:
            raise CacheError(
                f"{self.folder / name}: damaged, its bytes in {shard.name} do not match their checksum"
            )
        return data

    def _header_of(self, name: str, shard: Path, row: CatalogRow) -> Header:
        return unpack_header(
            self.folder / name,
            row.length,
            lambda start, count: self._read_at(shard, row.offset + start, count),
        )

    def _read_at(self, shard: Path, offset: int, count: int) -> bytes:
        if not hasattr(os, "pread"):  # Windows, which removes and replaces no file that is open
            with shard.open("rb") as opened:
                opened.seek(offset)
                return opened.read(count)
        file = self._handle(shard)
        data = os.pread(file.fileno(), count, offset)
        while 0 < len(data) < count:  # a read is at most 2 GB
            more = os.pread(file.fileno(), count - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def _handle(self, shard: Path) -> BinaryIO:
        """Return an open shard. Another thread that still reads from one keeps it open by its own name."""
        with self._lock:
            file = self._handles.get(shard.name)
            if file is None:
                if len(self._handles) >= MOST_OPEN:
                    self._handles.pop(next(iter(self._handles)))
                file = self._handles[shard.name] = shard.open("rb", buffering=0)
            return file
