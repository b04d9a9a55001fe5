"""Facts about a cache folder's entries that earlier runs verified: one Parquet file saves a later run from
reading a million of them again.

A row says: the entry of this name was read when it had this size and time; its tensors matched their
checksums; its record said this; and its sources had these sizes and times. As long as all are as they were,
nothing is read. The file is only a copy: without it, or where it says nothing, entries are read.
"""

import functools
import hashlib
import json
import logging
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from dataset.cache.files import Stamp
from dataset.cache.store import CacheStore
from modules.atomic_write import write_bytes
from modules.errors import OutputError

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

T = TypeVar("T")

INDEX_NAME = ".reelsmith-index.parquet"
LEAST_ROWS = 4096  # reading fewer entries takes seconds: no file appears
RACY_NS = 2_000_000_000  # two writes may have the same time: FAT counts in steps of two seconds

Row = tuple[str, int, int, int, str]  # name, size, mtime_ns, sources, facts: texts shared between rows


def fingerprint(stamps: Iterable[Stamp], text: str = "") -> int:
    """Return a fingerprint of 64 bits of sizes and times of files, and of a text."""
    data = b"".join([struct.pack("<qq", *stamp) for stamp in stamps]) + text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


class VerifiedEntries(Generic[T]):
    """Facts about the entries of one folder and kind. Threads may use it at once."""

    def __init__(self, store: CacheStore, kind: str, parse: Callable[[Any], T], is_trusted: bool) -> None:
        """kind: of entries. parse: turns the JSON value of facts into the callers' form. is_trusted: False
        reads all entries again, and only remembers the results.
        """
        self._store, self._kind, self._parse = store, kind, parse
        self._places: dict[str, int] = {}
        if is_trusted and (store.folder / INDEX_NAME).exists():
            import pyarrow.compute as pc  # pyarrow takes 0.1 s and 30 MiB, which few clips do without

            table = _read_table(store.folder)
            table = table.filter(pc.equal(table.column("kind"), kind))
            facts = table.column("facts").unify_dictionaries().combine_chunks()
            self._places = dict(zip(table.column("name").to_pylist(), range(len(table)), strict=True))
            self._numbers = [table.column(name).to_numpy() for name in ("size", "mtime_ns", "sources")]
            self._facts, self._texts = facts.indices.to_numpy(), facts.dictionary.to_pylist()
        self._parsed: dict[str, T | None] = {}
        self._noted: dict[str, Row] = {}
        self._shared: dict[str, str] = {}  # texts of noted facts: one object of each

    def get(self, name: str, sources: int) -> T | None:
        """Return the facts of an entry that is unchanged since it was verified with these sources.

        The same facts are the same object. sources: as `fingerprint` returns. None if nothing is known.
        """
        place = self._places.get(name)
        if place is None:
            return None
        size, mtime_ns, then = (numbers[place] for numbers in self._numbers)
        if then != sources or self._store.stamp(name) != (size, mtime_ns):
            return None
        text = self._texts[self._facts[place]]
        if text not in self._parsed:
            try:
                self._parsed[text] = self._parse(json.loads(text))
            except (KeyError, TypeError, ValueError):  # of an earlier version
                self._parsed[text] = None
        return self._parsed[text]

    def note(
        self, name: str, stamp: Stamp | None, sources: int, facts: Mapping[str, Any], newest_ns: int = 0
    ) -> None:
        """Remember an entry that was just found right, or written.

        stamp: of `CacheStore.stamp`, asked for before the entry was read. newest_ns: when one of its sources
        was last written. Files changed within the last two seconds are not remembered: the next change may
        bear the same time.
        """
        if stamp is not None and max(stamp[1], newest_ns) + RACY_NS <= time.time_ns():
            self.note_written(name, stamp, sources, facts)

    def note_written(self, name: str, stamp: Stamp | None, sources: int, facts: Mapping[str, Any]) -> None:
        """Remember an entry that this run has written. If it was at its very end, `rows` leaves it out."""
        if stamp is not None:
            text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
            self._noted[name] = (name, *stamp, sources, self._shared.setdefault(text, text))

    def rows(self) -> list[Row]:
        """Return the notes of this run."""
        newest = time.time_ns() - RACY_NS
        return [row for row in self._noted.values() if row[2] <= newest]

    def write(self, rows: Sequence[Row], least: int = LEAST_ROWS) -> None:
        """Write the folder's index with these rows more, unless it has fewer than `least` and is not there.

        Rows of entries that are gone are left out. A folder that cannot be written stays without.
        """
        path = self._store.folder / INDEX_NAME
        if not rows or (len(rows) < least and not path.exists()):
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        there, noted, schema = set(self._store.names()), {row[0] for row in rows}, _schema()
        old = _read_table(self._store.folder)  # another run may have written it meanwhile
        pairs = zip(old.column("name").to_pylist(), old.column("kind").to_pylist(), strict=True)
        kept = [name in there and not (kind == self._kind and name in noted) for name, kind in pairs]
        columns = [[self._kind] * len(rows), *zip(*rows, strict=True)]
        new = pa.table([pa.array(*pair) for pair in zip(columns, schema.types, strict=True)], schema=schema)
        table = pa.concat_tables([old.filter(pa.array(kept, pa.bool_())), new])
        sink = pa.BufferOutputStream()
        pq.write_table(
            table.unify_dictionaries().combine_chunks(), sink, compression="zstd", write_page_checksum=True
        )
        try:
            write_bytes(path, sink.getvalue().to_pybytes())
        except OutputError as error:
            logger.info("no index of the cache folder is kept: %s", error)


@dataclass
class Indexes(Generic[T]):
    """Facts about the entries of a run's tables, read at the first use of a table."""

    kind: str
    parse: Callable[[Any], T]
    is_trusted: bool = True
    _opened: dict[Path, VerifiedEntries[T]] = field(default_factory=dict)

    def of(self, store: CacheStore) -> VerifiedEntries[T]:
        """Return the facts about a store's entries."""
        if store.folder not in self._opened:
            self._opened[store.folder] = VerifiedEntries(store, self.kind, self.parse, self.is_trusted)
        return self._opened[store.folder]

    def rows(self, stores: Iterable[CacheStore]) -> list[list[Row]]:
        """Return the notes of this process, for each store."""
        return [self.of(store).rows() for store in stores]

    def write(self, stores: Sequence[CacheStore], gathered: Iterable[list[list[Row]]]) -> None:
        """Write the notes of all processes."""
        for store, rows in zip(stores, zip(*gathered, strict=True), strict=True):
            self.of(store).write([row for of_process in rows for row in of_process])


@functools.cache
def _schema() -> "pa.Schema":
    import pyarrow as pa

    columns = {
        "kind": pa.string(),
        "name": pa.large_string(),
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
        "sources": pa.int64(),
        "facts": pa.dictionary(pa.int32(), pa.string()),
    }
    return pa.schema(columns, metadata={b"reelsmith_index": b"1"})


def _read_table(folder: Path) -> "pa.Table":
    """Return the table of a folder; an empty one if there is none, or one that cannot be used."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / INDEX_NAME
    try:
        # not `read_table`: it starts threads, which can end a program with "terminate called" at its exit
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as opened:
            if not opened.schema_arrow.equals(_schema(), check_metadata=True):
                raise ValueError("it is of another version")
            return opened.read(use_threads=False)
    except FileNotFoundError:
        pass
    except (pa.ArrowException, OSError, ValueError) as error:
        logger.info("%s cannot be used (%s); the entries are read instead", path, error)
    return _schema().empty_table()
