"""Entries of a folder of shards, and their places: a table of SQLite, of all shards or from the index.

A shard is an SQLite file with the table `entries`. A row says of a name: its generation (one more than that
of what it replaces), how many bytes the entry has (NULL: it was removed), their CRC-32, and the bytes. The
index holds the same of all shards, without the bytes. It is only a copy, but it tells what is missing when a
shard was cut or deleted.
"""

import contextlib
import logging
import os
import platform
import re
import sqlite3
import struct
import tarfile
import time
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dataset.sources.media_source import INDEX, SHARD
from modules.atomic_write import LEFTOVER_SECONDS, atomic_path
from modules.errors import CacheError

logger = logging.getLogger(__name__)

FORMAT = 1  # PRAGMA user_version
CHECKSUM_PLACE = 68  # in an index: of its CRC-32
PAGE_BYTES = 16384  # entries of 2 KB are written twice as fast as in pages of 4096, those of 64 KB as fast
SHARD_TABLE = """
    CREATE TABLE entries (place INTEGER PRIMARY KEY, name BLOB, generation INTEGER, size INTEGER,
        crc32 INTEGER, data BLOB);
    CREATE UNIQUE INDEX names ON entries (name, generation, size, crc32);
"""
_INDEX_TABLES = """
    CREATE TABLE files (number INTEGER PRIMARY KEY, name TEXT, size INTEGER);
    CREATE TABLE entries (name BLOB PRIMARY KEY, file INTEGER, place INTEGER, generation INTEGER,
        size INTEGER, crc32 INTEGER) WITHOUT ROWID;
"""
REMOVED_CRC32 = -1  # instead of a checksum
# of two rows of one name the later one holds; of one generation the one that writes
_IF_NEWER = """
    ON CONFLICT (name) DO UPDATE SET file = excluded.file, place = excluded.place, size = excluded.size,
        generation = excluded.generation, crc32 = excluded.crc32
    WHERE (excluded.generation, excluded.crc32) > (entries.generation, entries.crc32)
"""
_UNLESS_THERE = """
    ON CONFLICT (name) DO UPDATE SET file = NULL, size = excluded.size, generation = excluded.generation
    WHERE excluded.generation > entries.generation
"""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class CatalogRow(NamedTuple):
    """Facts about a name."""

    shard: str | None  # None: there was an entry, but its shard was cut or deleted
    place: int
    generation: int
    size: int | None  # None: the entry was removed
    crc32: int


def encode_name(name: str) -> bytes:
    """Return the bytes of a name; those of file names that are no UTF-8 come back as they were."""
    return name.encode("utf-8", "surrogateescape")


def decode_name(name: bytes) -> str:
    """Return the name in a row's bytes."""
    return name.decode("utf-8", "surrogateescape")


def machine() -> str:
    """Return two words of eight digits for this machine: of its name, as containers differ in it, and of its
    last start. Machines with one of them in common are the same.
    """
    name = platform.node().encode()
    try:
        start = _BOOT_ID.read_bytes()
    except OSError:
        start = name
    return f"{zlib.crc32(name):08x}{zlib.crc32(start):08x}"


def list_shards(folder: Path) -> dict[str, int]:
    """Return the sizes of a folder's shards by their names, sorted."""
    found = {}
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                if SHARD.fullmatch(entry.name) and entry.is_file():
                    with contextlib.suppress(FileNotFoundError):  # merged meanwhile
                        found[entry.name] = entry.stat().st_size
    return dict(sorted(found.items()))


def address(path: Path) -> str:
    """Return a shard's address for SQLite. Finished ones are read without locks; one that is being written is
    locked by its writer.
    """
    if path.suffix != ".writing":
        return f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    # on a volume without locks, or on another machine's, only the age tells whether its writer lives
    return f"{path.absolute().as_uri()}?mode=rw{'&nolock=1' if _is_abandoned(path) else ''}"


def _is_abandoned(path: Path) -> bool:
    """Whether nobody has written a shard for long."""
    with contextlib.suppress(FileNotFoundError):  # its writer has just finished it
        return path.stat().st_mtime < time.time() - LEFTOVER_SECONDS
    return False


def connect(uri: str, seconds: float = 0.2) -> sqlite3.Connection:
    """Open an address. seconds: to wait for locks. Threads may share it."""
    found = sqlite3.connect(uri, seconds, isolation_level=None, check_same_thread=False, uri=True)
    found.execute("PRAGMA writable_schema = ON")  # otherwise SQLite reads nothing of a file that is cut
    found.execute("PRAGMA cache_size = -1024")
    return found


def may_be_written(path: Path) -> bool:
    """Whether a shard has a writer that lives on another machine, whose locks are not seen everywhere."""
    if path.suffix != ".writing" or _is_abandoned(path):
        return False
    words, here = path.stem.removeprefix("cache-"), machine()
    return words[:8] != here[:8] and words[8:16] != here[8:]


class Catalog:
    """The entries of a folder, as they were when it was looked at. Opening one changes nothing."""

    def __init__(self, folder: Path, without: Collection[str] = ()) -> None:
        """without: shards that are left out, as they are about to go."""
        self.folder = folder
        self.shards = {name: size for name, size in list_shards(folder).items() if name not in without}
        self.damaged: set[str] = set()  # shards that are cut or cannot be read
        self.busy: set[str] = set()  # those that others write
        self.foreign: set[str] = set()  # of later versions of this program
        self.bytes: dict[str, float] = {}  # of all rows of a shard, those of replaced entries too
        index = self._open_index()
        self.has_index = index is not None and _shards_of(index) == self.shards
        if self.has_index and index is not None:
            self._rows = index
        else:
            self._rows = connect(":memory:")
            self._collect(index is not None)

    def names(self) -> list[str]:
        """Return the names of all entries, lost ones too."""
        found = self._rows.execute("SELECT name FROM entries WHERE size IS NOT NULL")
        return [decode_name(name) for (name,) in found]

    def get(self, name: str) -> CatalogRow | None:
        """Return the facts about a name, removed and lost ones too."""
        row = self._rows.execute(
            "SELECT files.name, place, generation, entries.size, crc32 FROM entries LEFT JOIN files "
            "ON number = file WHERE entries.name = ?",
            (encode_name(name),),
        ).fetchone()
        return None if row is None else CatalogRow(*row)

    def rows_of(self, shards: Collection[str]) -> Iterator[tuple[bytes, CatalogRow]]:
        """Yield the rows in some shards, sorted by name."""
        found = self._rows.execute(
            "SELECT entries.name, files.name, place, generation, entries.size, crc32 FROM entries JOIN files "
            "ON number = file ORDER BY entries.name"
        )
        return ((name, CatalogRow(shard, *rest)) for name, shard, *rest in found if shard in shards)

    def entry_bytes(self) -> dict[str, int]:
        """Return how many bytes the entries of each shard have."""
        found = self._rows.execute(
            "SELECT files.name, total(entries.size) FROM entries JOIN files ON number = file GROUP BY file"
        )
        return dict.fromkeys(self.shards, 0) | {name: int(size) for name, size in found}

    def lost(self) -> list[str]:
        """Return the names of the entries that are lost, sorted."""
        found = self._rows.execute(
            "SELECT name FROM entries WHERE file IS NULL AND size IS NOT NULL ORDER BY name"
        )
        return [decode_name(name) for (name,) in found]

    def write_index(self, lost: Iterable[bytes] = ()) -> None:
        """Write the index of the folder. lost: names of more entries that are lost, unless a shard has them.

        Raises OutputError or sqlite3.Error.
        """
        self._rows.executemany(
            "INSERT OR IGNORE INTO entries VALUES (?, NULL, 0, 0, 0, 0)", ((name,) for name in lost)
        )
        path = self.folder / INDEX
        if not self.shards and not self.lost():
            path.unlink(missing_ok=True)
            return
        with (
            atomic_path(path) as temporary,
            contextlib.closing(connect(f"{temporary.absolute().as_uri()}?nolock=1")) as target,
        ):
            target.execute("PRAGMA journal_mode = OFF")
            self._rows.backup(target)
            target.close()
            with temporary.open("rb+") as file:
                checksum = _checksum(file)
                file.seek(CHECKSUM_PLACE)
                file.write(struct.pack(">I", checksum))

    def _open_index(self) -> sqlite3.Connection | None:
        path = self.folder / INDEX
        try:
            if not _is_whole(path):
                return None
            with path.open("rb") as file:
                file.seek(CHECKSUM_PLACE)
                stated = file.read(4)
                if stated != struct.pack(">I", _checksum(file)):
                    logger.warning("%s is damaged; the shards are read instead", path)
                    return None
            index = connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1")
            _shards_of(index)
        except (OSError, sqlite3.Error):
            return None
        return index

    def _collect(self, has_index: bool) -> None:
        """Read the rows of all shards, and what the index tells of those that are damaged or gone."""
        self._rows.executescript(_INDEX_TABLES)
        if has_index:
            uri = f"{(self.folder / INDEX).absolute().as_uri()}?mode=ro&immutable=1"
            self._rows.execute("ATTACH ? AS old", (uri,))
        for number, (name, size) in enumerate(self.shards.items()):
            path = self.folder / name
            self._rows.execute("INSERT INTO files VALUES (?, ?, ?)", (number, name, size))
            try:
                if name.endswith(".tar"):  # of an earlier version
                    rows, is_whole = read_old_shard(path)
                    self._rows.executemany(
                        f"INSERT INTO entries VALUES (?, {number}, ?, ?, ?, ?) {_IF_NEWER}", rows
                    )
                    self.damaged |= set() if is_whole else {name}
                else:
                    self._add_shard(number, path)
            except FileNotFoundError:  # merged meanwhile: what took its place is there
                pass
            except OSError as error:
                raise CacheError(f"{path} cannot be read: {error.strerror or error}") from error
            if has_index and name in self.damaged:  # what the index has of it
                self._rows.execute(
                    "INSERT INTO entries SELECT name, ?, place, generation, size, crc32 FROM old.entries "
                    f"WHERE file = (SELECT number FROM old.files WHERE name = ?) {_IF_NEWER}",
                    (number, name),
                )
            if name in self.busy | self.foreign:  # so that the index never says that it has all of it
                self._rows.execute("DELETE FROM files WHERE number = ?", (number,))
        if has_index:
            self._rows.execute(
                "INSERT INTO entries SELECT name, NULL, 0, generation, size, crc32 FROM old.entries "
                f"WHERE size IS NOT NULL {_UNLESS_THERE}"
            )
            self._rows.execute("DETACH old")

    def _add_shard(self, number: int, path: Path) -> None:
        is_finished = path.suffix == ".sqlite"
        if may_be_written(path):
            self.busy.add(path.name)
            return
        if is_finished and not _is_whole(path):
            self.damaged.add(path.name)
        try:
            self._rows.execute("ATTACH ? AS shard", (address(path),))
            ((version,),) = self._rows.execute("PRAGMA shard.user_version").fetchall()
            if version > FORMAT:
                self.foreign.add(path.name)
                return
            self._rows.execute(
                "INSERT INTO entries SELECT name, ?, place, generation, size, crc32 FROM shard.entries "
                f"WHERE true {_IF_NEWER}",
                (number,),
            )
            (total,) = self._rows.execute("SELECT total(size) FROM shard.entries").fetchone()
            self.bytes[path.name] = total
        except sqlite3.Error as error:
            if is_finished:
                with path.open("rb") as file:  # SQLite takes some errors of a volume for damage
                    while file.read(1 << 20):
                        pass
                if error.sqlite_errorcode & 0xFF in _UNAVAILABLE:
                    raise CacheError(f"{path} cannot be read: {error}. Run this again") from error
            # locked by its writer, or its writer has not begun
            is_busy = not is_finished and isinstance(error, sqlite3.OperationalError)
            (self.busy if is_busy else self.damaged).add(path.name)
            if not is_busy:
                with contextlib.suppress(sqlite3.Error):  # one by one, up to the damage
                    rows = self._rows.execute(
                        "SELECT name, place, generation, size, crc32 FROM shard.entries NOT INDEXED "
                        "ORDER BY place"
                    )
                    for row in iter(rows.fetchone, None):
                        self._rows.execute(
                            f"INSERT INTO entries VALUES (?, {number}, ?, ?, ?, ?) {_IF_NEWER}", row
                        )
        finally:
            with contextlib.suppress(sqlite3.Error):  # it was not even opened
                self._rows.execute("DETACH shard")


# what a volume, not a file, is at fault for
_UNAVAILABLE = (
    *(sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_BUSY),
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_LOCKED),
)


def _shards_of(index: sqlite3.Connection) -> dict[str, int]:
    return dict(index.execute("SELECT name, size FROM files ORDER BY name").fetchall())


def _checksum(file: BinaryIO) -> int:
    """Return the CRC-32 of an index behind the place of its checksum, the application id of SQLite."""
    file.seek(CHECKSUM_PLACE + 4)
    crc32 = 0
    while piece := file.read(1 << 20):
        crc32 = zlib.crc32(piece, crc32)
    return crc32


def _is_whole(path: Path) -> bool:
    """Whether a database has as many bytes as it says. Raises OSError."""
    with path.open("rb") as file:
        header = file.read(32)
        if len(header) < 32 or not header.startswith(b"SQLite format 3\0"):
            return False
        page, pages = struct.unpack_from(">H", header, 16)[0], struct.unpack_from(">I", header, 28)[0]
        return bool(os.fstat(file.fileno()).st_size == pages * (65536 if page == 1 else page))


# --- shards of earlier versions: tars, each entry behind a comment with its facts
# ------------------------------------------------------------------------------------------------------------

_COMMENT = re.compile(
    rb" comment=(reelsmith 1 (entry|removed) (\d{1,9}) (\d{1,11}) ([0-9a-f]{8}) )([0-9a-f]{8}) (.+?)\n"
    rb"(?=\0|\d+ path=|$)",
    re.DOTALL,
)
_MOST_COMMENT = 1 << 16

# name, offset of its bytes, generation, length (None: it was removed), CRC-32 of its bytes
OldRow = tuple[bytes, int, int, int | None, int]


def read_old_shard(path: Path) -> tuple[list[OldRow], bool]:
    """Return the records of a tar, and whether it is whole: behind a damaged place the next one is searched.

    That an entry was removed stands in a global header. `tools/convert_cache.py --to shards` makes such
    shards anew. Raises OSError.
    """
    rows: list[OldRow] = []
    is_whole, size, found = True, path.stat().st_size, None
    with path.open("rb") as file:
        while (position := file.tell()) < size:
            try:
                header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
                if not 0 <= header.size <= size:
                    raise tarfile.HeaderError("a wrong size")
            except tarfile.HeaderError as error:
                is_end = isinstance(error, tarfile.EOFHeaderError)  # type: ignore[attr-defined]
                if is_end and size - position == 2 * tarfile.BLOCKSIZE:
                    return rows, is_whole
                is_whole, found = False, None
                file.seek(position + tarfile.BLOCKSIZE)
                continue
            start = file.tell()
            end = start + -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE) and header.size <= _MOST_COMMENT:
                content = file.read(header.size)
                found = _COMMENT.search(content)
                if found is not None and zlib.crc32(found[1] + found[7]) != int(found[6], 16):
                    is_whole, found = False, None
                if found is not None and found[2] == b"removed":
                    rows.append((found[7], 0, int(found[3]), None, -1))
            elif found is not None and header.size == int(found[4]) and end <= size:
                rows.append((found[7], start, int(found[3]), header.size, int(found[5], 16)))
                found = None
            else:
                is_whole = False
            file.seek(end)
    return rows, False
