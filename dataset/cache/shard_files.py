"""Write shards, tell what is wrong with those of a folder, and merge them."""

import contextlib
import secrets
import sqlite3
import time
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

from dataset.cache.catalog import (
    FORMAT,
    PAGE_BYTES,
    REMOVED_CRC32,
    SHARD_TABLE,
    Catalog,
    CatalogRow,
    address,
    connect,
    machine,
    may_be_written,
)
from dataset.sources.media_source import INDEX, OLD_INDEX, is_of_shards
from modules.atomic_write import check_space, explain_errors, flush_folder, remove_leftovers
from modules.errors import CacheError, OutputError
from modules.file_locks import only_one

SHARD_BYTES = 1 << 30  # a writer begins another shard when it has as many
SMALL = 0.5  # of these bytes: smaller ones are merged
MOST_HOLES = 0.25  # of the bytes of a shard: what more is reclaimed
LOCK = ".cache-index.lock"  # is there while shards are merged


@contextlib.contextmanager
def explain_sqlite(path: Path) -> Iterator[None]:
    """Raise OutputError in place of an error of SQLite, or of the system, while writing a shard."""
    try:
        with explain_errors(path):
            yield
    except sqlite3.Error as error:
        raise OutputError(
            f"{path} cannot be written: {error}. What was written before is kept. Free some space or choose "
            "another folder, and run again."
        ) from error


class ShardWriter:
    """The shard that a process fills. It is locked until it is finished, so that nobody merges it."""

    def __init__(self, folder: Path) -> None:
        self._mark = secrets.token_hex(8)
        self.path = folder / f"cache-{machine()}{self._mark}.writing"
        self.size = 0
        self.began = time.monotonic()
        with explain_sqlite(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self.rows = self._begin(self.path.absolute().as_uri())
                if not self.path.exists():  # another process took it for one of a killed writer
                    self.rows.close()
                    self.rows = self._begin(self.path.absolute().as_uri())
            except sqlite3.OperationalError:  # a volume without locks: nobody else uses this name
                self.rows = self._begin(f"{self.path.absolute().as_uri()}?nolock=1")
            flush_folder(folder)

    def _begin(self, uri: str) -> sqlite3.Connection:
        rows = connect(uri, seconds=2)
        try:
            for setting in (f"page_size = {PAGE_BYTES}", "locking_mode = EXCLUSIVE", "cache_size = -65536"):
                rows.execute(f"PRAGMA {setting}")
            rows.execute("PRAGMA journal_mode = TRUNCATE")
            rows.execute(f"PRAGMA user_version = {FORMAT}")
            rows.executescript(SHARD_TABLE)
            rows.isolation_level = "DEFERRED"  # from now on, rows are kept by a COMMIT
        except BaseException:
            rows.close()
            raise
        return rows

    def put(self, name: bytes, generation: int, data: bytes | None) -> int:
        """Write a row in place of an earlier one; return its place. data: None of a removed entry."""
        size, crc32 = (None, REMOVED_CRC32) if data is None else (len(data), zlib.crc32(data))
        check_space(self.path, size or 0)
        if generation:
            self.rows.execute("DELETE FROM entries WHERE name = ?", (name,))
        done = self.rows.execute(
            "INSERT INTO entries VALUES (NULL, ?, ?, ?, ?, ?)", (name, generation, size, crc32, data)
        )
        self.size += size or 0
        assert done.lastrowid is not None
        return done.lastrowid

    def finish(self) -> Path:
        """Make sure that all rows survive, and give the shard its final name."""
        with explain_sqlite(self.path):
            try:
                if self.rows.in_transaction:
                    self.rows.execute("COMMIT")
                self.rows.execute("PRAGMA journal_mode = DELETE")
            finally:
                self.rows.close()
            return give_final_name(self.path)


def give_final_name(path: Path) -> Path:
    """Rename a shard that nobody writes any more, so that all may read it without locks."""
    final = path.with_name(f"cache-{path.stem[-16:]}.sqlite")
    path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
    try:
        path.rename(final)
    except FileNotFoundError:  # a process that merges was faster
        if not final.exists():
            raise
    flush_folder(path.parent)
    return final


def read_row(rows: sqlite3.Connection | None, folder: Path, row: CatalogRow) -> bytes:
    """Return the bytes of an entry, not compared with their checksum. rows: its open shard, None of a tar.

    Raises OSError or sqlite3.Error, CacheError if there are none.
    """
    if rows is None:
        with (folder / str(row.shard)).open("rb") as file:
            file.seek(row.place)
            return file.read(row.size)
    found = rows.execute("SELECT data FROM entries WHERE place = ?", (row.place,)).fetchone()
    if found is None or not isinstance(found[0], bytes):
        raise CacheError(f"{folder / str(row.shard)}: damaged, it has no row {row.place}")
    return found[0]


def shard_faults(folder: Path) -> list[str]:
    """Return what is wrong with a folder: shards that are cut, damaged or unfinished, and lost entries."""
    catalog, said = Catalog(folder), []
    for name in catalog.shards:
        path = folder / name
        if name in catalog.damaged:
            said.append(f"{path} is damaged: it was cut, or its bytes were changed")
        elif name in catalog.foreign:
            said.append(
                f"{path} is of a later version of this program. It is left alone: move it out of the folder, "
                "or use that version"
            )
        elif name.endswith(".writing"):
            said.append(f"{path} has no end: caching was stopped, or is still running")
    lost = catalog.lost()
    if lost:
        said.append(
            f"{folder}: shards were cut or removed, and {len(lost)} entries with them, such as {lost[0]}"
        )
    return said


def merge_shards(folder: Path, shard_bytes: int = SHARD_BYTES, with_tars: bool = False) -> None:
    """Put a folder in order: at most one small shard, none that is unfinished or damaged, and an index.

    One process at a time does this. Shards that others write are left alone. with_tars: turn those of
    earlier versions into SQLite files. Raises OutputError if there is no room for it; nothing is lost then.
    """
    if not folder.is_dir():
        return
    if Catalog(folder).has_index and not with_tars and not (folder / LOCK).exists():
        return
    with explain_sqlite(folder / INDEX), only_one(folder / LOCK):
        remove_leftovers(folder, is_of_shards)
        for path in folder.glob("cache-*.writing"):
            _adopt(path)
        for path in folder.glob("cache-*.writing-journal"):
            if not path.with_suffix(".writing").exists():
                path.unlink(missing_ok=True)
        catalog = Catalog(folder)
        sizes = catalog.entry_bytes()
        ours = {name for name in catalog.shards if name.endswith(".sqlite")} - catalog.foreign
        small = {name for name in ours if catalog.shards[name] < shard_bytes * SMALL}
        untidy = catalog.damaged | {
            name for name in ours if sizes[name] < catalog.bytes.get(name, 0) * (1 - MOST_HOLES)
        }
        untidy |= {name for name in catalog.shards if with_tars and name.endswith(".tar")}
        if len(small) > 1 or untidy:
            _rewrite(catalog, small | untidy, shard_bytes)
        else:
            catalog.write_index()


def _adopt(path: Path) -> None:
    """Finish a shard whose writer was killed; leave it if the writer may live, however long ago it wrote."""
    with contextlib.suppress(OSError, sqlite3.Error):
        if may_be_written(path):
            return
        uri = f"{path.absolute().as_uri()}?mode=rw"
        with contextlib.closing(connect(uri, seconds=0)) as rows:
            try:
                rows.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                    return
                uri = address(path)  # a volume without locks
        with contextlib.closing(connect(uri, seconds=0)) as rows:
            rows.execute("PRAGMA locking_mode = EXCLUSIVE")
            rows.execute("BEGIN EXCLUSIVE")  # undoes what its writer had not committed
            (tables,) = rows.execute("SELECT count(*) FROM sqlite_master").fetchone()
            rows.execute("COMMIT")
            if not tables:  # it was killed at once
                path.unlink()
                return
        give_final_name(path)


def _rewrite(catalog: Catalog, shards: Collection[str], shard_bytes: int) -> None:
    """Write the valid entries of some shards to new ones, then remove them.

    The new ones get their names, then the index follows, then the others go: a kill between any two of these
    leaves every entry in one shard or in two.
    """
    folder, unreadable = catalog.folder, list[bytes]()
    sizes, opened = catalog.entry_bytes(), dict[str, sqlite3.Connection]()
    check_space(folder / INDEX, sum(sizes[name] for name in shards))
    writer: ShardWriter | None = None
    try:
        for name, row in catalog.rows_of(shards):
            shard = str(row.shard)
            if not shard.endswith(".tar") and shard not in opened:
                opened[shard] = connect(address(folder / shard))
            try:
                data = None if row.size is None else read_row(opened.get(shard), folder, row)
            except (CacheError, sqlite3.DatabaseError) as error:
                if isinstance(error, sqlite3.OperationalError):  # of the volume: what is there may be whole
                    raise OutputError(f"{folder / shard} cannot be read: {error}. Run this again") from error
                data = b""
            if data is not None and zlib.crc32(data) != row.crc32:
                unreadable.append(name)
                continue
            if writer is not None and writer.size >= shard_bytes:
                writer.finish()
                writer = None
            writer = writer or ShardWriter(folder)
            with explain_sqlite(writer.path):
                writer.put(name, row.generation, data)
        if writer is not None:
            writer.finish()
    except BaseException:
        if writer is not None:
            writer.rows.close()
            writer.path.unlink(missing_ok=True)  # unless it is finished
        raise
    finally:
        for one in opened.values():
            one.close()
    after = Catalog(folder, without=shards)
    after.write_index(lost=unreadable)
    for shard in shards:
        with contextlib.suppress(PermissionError):  # Windows: someone reads it
            (folder / shard).unlink(missing_ok=True)
    if not any(name.endswith(".tar") for name in after.shards):
        (folder / OLD_INDEX).unlink(missing_ok=True)
