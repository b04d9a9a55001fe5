"""The entries of a folder of shards, and the one shard that a process writes.

A shard is an SQLite file with the table `entries`. A row contains a name, its generation (one more than the
entry that it replaces), the number of bytes (NULL: the entry was removed), their CRC-32, and the bytes.
"""

import contextlib
import itertools
import os
import platform
import secrets
import sqlite3
import stat
import tarfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.cache.old_shards import ShardRow, read_old_shard
from dataset.sources.media_source import SHARD
from modules.atomic_write import LEFTOVER_SECONDS, check_space, explain_errors, flush_folder
from modules.errors import CacheError, OutputError
from modules.limits import MAX_CACHE_NAME_BYTES, MAX_ENTRY_BYTES, MAX_GENERATION

FORMAT = 1  # PRAGMA user_version
# SQLite's magic number, which in a rollback journal follows the name of a super-journal
_JOURNAL = bytes.fromhex("d9d505f920a163d7")
PAGE_BYTES = 16384  # writes entries of 2 KB twice as fast as 4096, and entries of 64 KB equally fast
SHARD_TABLE = """
    CREATE TABLE entries (place INTEGER PRIMARY KEY, name BLOB, generation INTEGER, size INTEGER,
        crc32 INTEGER, data BLOB);
    CREATE UNIQUE INDEX names ON entries (name, generation, size, crc32);
"""
_STATEMENTS = [statement.strip() for statement in SHARD_TABLE.split(";")[:-1]]
REMOVED_CRC32 = -1  # instead of a checksum
# SQLite errors that the disk causes, not the content of the file
_UNAVAILABLE = (
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_LOCKED,
)


class EntryRow(NamedTuple):
    """Where the current bytes of a cache entry are stored: shard and position."""

    shard: str
    position: int  # key of the row in SQLite; offset of the bytes in a tar of earlier versions
    generation: int
    size: int | None  # None: the entry was removed
    crc32: int


def encode_name(name: str) -> bytes:
    """Return a file name as bytes; names that are not UTF-8 keep their original bytes."""
    return name.encode("utf-8", "surrogateescape")


def list_shards(folder: Path) -> dict[str, int]:
    """Return the shard files of a folder, sorted by name, with their sizes in bytes."""
    sizes = {}
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                if SHARD.fullmatch(entry.name) and entry.is_file():
                    with contextlib.suppress(FileNotFoundError):  # merged meanwhile
                        sizes[entry.name] = entry.stat().st_size
    return dict(sorted(sizes.items()))


def connect(uri: str, seconds: float = 0.2) -> sqlite3.Connection:
    """Connect to an SQLite URI; threads may share the connection.

    `seconds` is the time to wait for locks.
    """
    connection = sqlite3.connect(uri, seconds, isolation_level=None, check_same_thread=False, uri=True)
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cache_size = -1024")
    return connection


def _limit_steps(connection: sqlite3.Connection, size: int) -> None:
    """Abort SQL statements that take far more steps than a file of `size` bytes can need."""
    # In a malicious file, pages can refer to each other in a cycle, so that a query never ends.
    calls = itertools.count()
    max_calls = 2 + (size >> 18)
    # called every 2^20 instructions of SQLite's virtual machine; a true result stops the statement
    connection.set_progress_handler(lambda: next(calls) > max_calls, 1 << 20)


def _require_table(connection: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError unless a database contains only the table of a shard."""
    # A view, a trigger or a computed column would run SQL that somebody else wrote.
    statements = [sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master LIMIT 3")]
    if sorted(map(str, statements)) != sorted(_STATEMENTS):
        raise sqlite3.DatabaseError("its tables are not those of a shard")


def open_shard(path: Path) -> sqlite3.Connection:
    """Open a finished shard for reading, without locks: finished shards never change."""
    return connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1")


class Catalog:
    """Index of the entries in a folder's shards, as of the time when they were read."""

    def __init__(self, folder: Path, writer: "ShardWriter | None" = None) -> None:
        """Read which entries a folder's shards contain; `writer` writes the shard of this process.

        Raises CacheError if a shard cannot be read.
        """
        self.shard_sizes = list_shards(folder)
        # shards that were truncated or changed: none of their entries is used
        self.damaged_shards: set[str] = set()
        self.problems: list[str] = []  # messages about shards that cannot be used
        # total size of all rows by SQLite shard, including replaced entries
        self.stored_bytes: dict[str, int] = {}
        self.entries: dict[str, EntryRow] = {}  # by name
        for name in self.shard_sizes:
            path = folder / name
            try:
                if writer is not None and path == writer.path:
                    self._add(name, _rows_in(writer.connection))
                elif path.suffix == ".writing":  # the shard of another process, or of a killed one
                    self.problems.append(f"{path} is unfinished: caching was stopped, or is still running")
                elif path.suffix == ".tar":
                    self._add(name, read_old_shard(path))
                    del self.stored_bytes[name]  # only SQLite shards are counted
                else:
                    self._read_shard(path)
            except FileNotFoundError:  # merged meanwhile: the new shard has its entries
                pass
            except OSError as error:
                raise CacheError(f"{path} cannot be read: {error.strerror or error}") from error
            except (sqlite3.Error, tarfile.HeaderError):
                self.damaged_shards.add(name)
        self.problems += [
            f"{folder / name} is damaged: it was cut, or its bytes were changed"
            for name in self.damaged_shards
        ]

    def names(self) -> list[str]:
        """Return the names of all entries in the shards that have not been removed."""
        return [name for name, row in self.entries.items() if row.size is not None]

    def count_live_bytes(self) -> dict[str, int]:
        """Return the bytes that each shard's current entries occupy, by the shard's file name."""
        sizes = dict.fromkeys(self.shard_sizes, 0)
        for row in self.entries.values():
            sizes[row.shard] += row.size or 0
        return sizes

    def _add(self, shard: str, rows: Sequence[ShardRow]) -> None:
        """Add a shard's rows to the index; if a name has several rows, the latest one counts."""
        self.stored_bytes[shard] = sum(size or 0 for _, _, _, size, _ in rows)
        for encoded_name, position, generation, size, crc32 in rows:
            row = EntryRow(shard, position, generation, size=size, crc32=crc32)
            name = encoded_name.decode("utf-8", "surrogateescape")
            old = self.entries.setdefault(name, row)
            # the later generation is used; if they are equal, the row that is not a removal
            if (row.generation, row.crc32) > (old.generation, old.crc32):
                self.entries[name] = row

    def _read_shard(self, path: Path) -> None:
        """Add the entries of a finished SQLite shard to the index."""
        try:
            with contextlib.closing(open_shard(path)) as connection:
                _limit_steps(connection, path.stat().st_size)
                ((version,),) = connection.execute("PRAGMA user_version")
                if version > FORMAT:
                    self.problems.append(
                        f"{path} is from a later version of this program and is not used: move it out of the "
                        "folder, or use that version"
                    )
                    return
                _require_table(connection)
                self._add(path.name, _rows_in(connection))
        except sqlite3.Error as error:
            # SQLite reports some errors of the disk as damage. Then reading the whole file raises OSError,
            # which the caller reports instead
            with path.open("rb") as file:
                while file.read(1 << 20):
                    pass
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _UNAVAILABLE:
                raise CacheError(f"{path} cannot be read: {error}. Run this again") from error
            raise


def _rows_in(connection: sqlite3.Connection) -> list[ShardRow]:
    """Read name, row number (`place`), generation, size and checksum of each entry in a shard."""
    entries = connection.execute("SELECT name, place, generation, size, crc32 FROM entries").fetchall()
    for name, _, generation, size, crc32 in entries:
        is_valid = (
            isinstance(name, bytes)
            and 0 < len(name) <= MAX_CACHE_NAME_BYTES
            and _is_within(generation, MAX_GENERATION)
            and _is_within(size or 0, MAX_ENTRY_BYTES)  # None: the entry was removed
            and _is_within(crc32, 0xFFFFFFFF)
        )
        if not is_valid:
            raise sqlite3.DatabaseError("a row of another program")
    return entries


def _is_within(number: object, limit: int) -> bool:
    """Return whether a value is an integer (not bool) from -1 (REMOVED_CRC32) to `limit`."""
    return type(number) is int and -1 <= number <= limit


# --- the shard that a process writes
# ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explain_sqlite(path: Path) -> Iterator[None]:
    """Convert SQLite and OS errors raised while a shard is written to OutputError."""
    try:
        with explain_errors(path):
            yield
    except sqlite3.Error as error:
        raise OutputError(
            f"{path} cannot be written: {error}. What was written before is kept. Free some space or choose "
            "another folder, and run again."
        ) from error


def machine() -> str:
    """Return eight characters that identify this machine in shard names."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


class ShardWriter:
    """The shard file that this process writes, locked until it is finished: no other process takes it over.

    SQLite writes it with a write-ahead log: all entries survive if the process is killed, and all but the
    last megabytes survive a power failure.
    """

    def __init__(self, folder: Path) -> None:
        """Create a shard with a new name in a folder, and lock it."""
        self.size = 0  # bytes written so far
        self.start_time = time.monotonic()
        with explain_sqlite(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # three attempts with locks, then one for file systems without locks
            for parameters in ("", "", "", "?nolock=1"):
                self.path = folder / f"cache-{machine()}{secrets.token_hex(12)}.writing"
                try:
                    self.connection = _begin(f"{self.path.absolute().as_uri()}{parameters}")
                except sqlite3.OperationalError as error:
                    for leftover in folder.glob(f"{self.path.name}*"):  # also its journals
                        leftover.unlink(missing_ok=True)
                    is_full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
                    if parameters or is_full:
                        raise
                    continue
                if self.path.exists():
                    break
                # another process took the new file, not yet locked, for a killed writer's, and renamed it
                self.connection.close()
            flush_folder(folder)

    def put(self, name: bytes, generation: int, data: bytes | None) -> EntryRow:
        """Write an entry's bytes as a row, replacing an earlier one; None marks the entry as removed."""
        size: int | None = None
        crc32 = REMOVED_CRC32
        if data is not None:
            size = len(data)
            crc32 = zlib.crc32(data)
        check_space(self.path, size or 0)
        with explain_sqlite(self.path), self.connection:
            self.connection.execute("BEGIN")
            if generation:  # 0 is a new entry
                self.connection.execute("DELETE FROM entries WHERE name = ?", (name,))
            values = (name, generation, size, crc32, data)
            # NULL: SQLite chooses the key, which is the row's place
            cursor = self.connection.execute("INSERT INTO entries VALUES (NULL, ?, ?, ?, ?, ?)", values)
        self.size += size or 0
        assert cursor.lastrowid is not None
        return EntryRow(
            shard=self.path.name, position=cursor.lastrowid, generation=generation, size=size, crc32=crc32
        )

    def finish(self) -> None:
        """Flush all rows to disk, and give the shard its final name."""
        with explain_sqlite(self.path):
            try:
                # moves the write-ahead log into the file
                self.connection.execute("PRAGMA journal_mode = DELETE")
            finally:
                self.connection.close()
            _rename_finished(self.path)


def _begin(uri: str) -> sqlite3.Connection:
    """Create the database of a new shard, locked for this process."""
    connection = connect(uri)
    try:
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        # with an exclusive lock, the index of the write-ahead log needs no shared file
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA cache_size = -65536")  # in KiB
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")  # fast; a power failure may lose the last entries
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.executescript(SHARD_TABLE)
    except BaseException:
        connection.close()
        raise
    return connection


def _rename_finished(path: Path) -> None:
    """Rename a finished shard, so that all processes can read it without locks."""
    final = path.with_name(f"cache-{path.stem[-16:]}.sqlite")  # the last 16 of its random characters
    try:
        path.rename(final)
    except FileNotFoundError:  # another process was faster, and may have merged it since
        if not path.parent.is_dir():
            raise
    flush_folder(path.parent)


def finish_abandoned_shards(folder: Path, own_shard: Path | None = None) -> None:
    """Finish the shards of killed writers; leave the shards of writers that may still run.

    `own_shard` is the shard that this process writes.
    """
    for path in folder.glob("cache-*.writing"):
        if path != own_shard:
            with contextlib.suppress(OSError, sqlite3.Error):
                _finish_if_abandoned(path)
    # journals of writers that were killed before their shard had any content
    for path in folder.glob("cache-*.writing-*"):
        shard_name = path.name.rpartition("-")[0]
        if not os.path.lexists(path.with_name(shard_name)):
            with contextlib.suppress(OSError):  # a folder of that name
                path.unlink()


def _finish_if_abandoned(path: Path) -> None:
    """Recover and rename an unfinished shard if its writer no longer runs."""
    # Locks show whether a writer still runs. For writers on other machines, and on file systems without
    # locks, the file's age decides.
    is_old = path.stat().st_mtime < time.time() - LEFTOVER_SECONDS
    is_from_this_machine = path.stem[6:14] == machine()  # after "cache-"
    if not (is_old or is_from_this_machine) or not _is_safe_to_open(path):
        return
    try:
        is_empty = _recover(path)
    except sqlite3.OperationalError as error:
        if not is_old or error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
            return
        is_empty = _recover(path, "&nolock=1")  # a volume without locks
    if not is_empty:
        _rename_finished(path)


def _is_safe_to_open(path: Path) -> bool:
    """Return whether a shard and its journals are regular files that make SQLite touch no other file."""
    # False if one is a link, or if a rollback journal ends with the name of another file, which SQLite would
    # remove.
    for suffix in ("", "-wal", "-shm", "-journal"):
        file = path.with_name(path.name + suffix)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(file.lstat().st_mode):
                return False
            with file.open("rb") as opened:
                opened.seek(-min(len(_JOURNAL), file.stat().st_size), os.SEEK_END)
                # only a rollback journal can end with the name of another file, followed by this mark
                if suffix == "-journal" and opened.read() == _JOURNAL:
                    return False
    return True


def _recover(path: Path, parameters: str = "") -> bool:
    """Recover what the killed writer of a shard had committed."""
    # `parameters` are added to the shard's SQLite URI.
    uri = f"{path.absolute().as_uri()}?mode=rw{parameters}"
    with contextlib.closing(connect(uri, seconds=0)) as connection:
        _limit_steps(connection, path.stat().st_size)
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        # the first transaction makes SQLite replay the write-ahead log of the killed writer
        connection.execute("BEGIN EXCLUSIVE")
        ((num_tables,),) = connection.execute("SELECT count(*) FROM sqlite_master")
        connection.execute("COMMIT")
        # merges the log into the shard and removes it
        connection.execute("PRAGMA journal_mode = DELETE")
        if not num_tables:
            path.unlink()  # while it is locked: a writer that has just begun notices and begins again
        return not num_tables
