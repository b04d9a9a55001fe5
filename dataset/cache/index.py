"""Facts about a cache folder's entries that earlier runs verified: one Parquet file saves a later run from
reading a million of them again.

A row says: the entry of this name was read when it had this size and time; its tensors matched their
checksums; its record said this; and its sources had these sizes and times. As long as all are as they were,
nothing is read. The file is only a copy: without it, or where it says nothing, entries are read.
"""

import hashlib
import json
import logging
import struct
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dataset.cache.files import Stamp
from dataset.cache.store import CacheStore
from modules.atomic_write import write_bytes
from modules.errors import OutputError

logger = logging.getLogger(__name__)

T = TypeVar("T")

INDEX_NAME = ".reelsmith-index.parquet"
LEAST_ROWS = 4096  # reading fewer entries takes seconds: no file appears
RACY_NS = 2_000_000_000  # two writes may have the same time: FAT counts in steps of two seconds
VERSION = b"1"
_VERSION_KEY = b"reelsmith_index"
_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("name", pa.large_string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("sources", pa.int64()),
        ("facts", pa.dictionary(pa.int32(), pa.string())),
    ]
)

Row = tuple[str, int, int, int, str]  # name, size, mtime_ns, sources, facts: texts shared between rows
_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError)


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
        self._folder = store.folder
        self._columns = _read_columns(self._folder, kind)
        self._is_trusted = is_trusted
        self._noted: dict[str, Row] = {}
        self._texts: dict[str, str] = {}  # of noted facts: one object of each
        self._parsed: dict[str, T | None] = {}

    def get(self, name: str, sources: int) -> T | None:
        """Return the facts of an entry that is unchanged since it was verified with these sources.

        The same facts are the same object. sources: as `fingerprint` returns. None if nothing is known.
        """
        if not self._is_trusted:
            return None
        columns = self._columns
        row = columns.places.get(name)
        if row is None or columns.sources[row] != sources:
            return None
        if self._store.stamp(name) != (columns.size[row], columns.mtime_ns[row]):
            return None
        text = columns.texts[columns.facts[row]]
        if text not in self._parsed:
            try:
                self._parsed[text] = self._parse(json.loads(text))
            except (KeyError, TypeError, ValueError):
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
        if stamp is None or max(stamp[1], newest_ns) + RACY_NS > time.time_ns():
            return
        self._keep(name, stamp, sources, facts)

    def note_written(self, name: str, stamp: Stamp | None, sources: int, facts: Mapping[str, Any]) -> None:
        """Remember an entry that this run has written. If it was at its very end, `rows` leaves it out."""
        if stamp is not None:
            self._keep(name, stamp, sources, facts)

    def _keep(self, name: str, stamp: Stamp, sources: int, facts: Mapping[str, Any]) -> None:
        text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
        text = self._texts.setdefault(text, text)
        self._noted[name] = (name, *stamp, sources, text)

    def rows(self) -> list[Row]:
        """Return the notes of this run."""
        newest = time.time_ns() - RACY_NS
        return [row for row in self._noted.values() if row[2] <= newest]

    def write(self, rows: Sequence[Row], least: int = LEAST_ROWS) -> None:
        """Write the folder's index with these rows more, unless it has fewer than `least` and is not there.

        Rows of entries that are gone are left out. A folder that cannot be written stays without.
        """
        if not rows:
            return
        there = self._store.names()
        noted = {row[0] for row in rows}
        old = _read_table(self._folder)  # another run may have written it meanwhile
        old = old.filter(pa.array(_is_kept(old, self._kind, there, noted), pa.bool_()))
        if len(old) + len(rows) < least and not (self._folder / INDEX_NAME).exists():
            return
        table = pa.concat_tables([old, _as_table(self._kind, rows)]).unify_dictionaries().combine_chunks()
        sink = pa.BufferOutputStream()
        schema = _SCHEMA.with_metadata({_VERSION_KEY: VERSION})
        with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
            for kind in table.column("kind").unique().to_pylist():  # a reader reads those of one kind
                writer.write_table(table.filter(pc.equal(table.column("kind"), kind)).cast(schema))
        try:
            write_bytes(self._folder / INDEX_NAME, sink.getvalue().to_pybytes())
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
        of_stores = zip(*gathered, strict=True)
        for store, rows in zip(stores, of_stores, strict=True):
            self.of(store).write([row for of_process in rows for row in of_process])


@dataclass(frozen=True)
class _Columns:
    """The rows of an index."""

    places: dict[str, int]  # of names
    size: NDArray[np.int64]
    mtime_ns: NDArray[np.int64]
    sources: NDArray[np.int64]
    facts: NDArray[np.int32]  # places in `texts`
    texts: list[str]

    @staticmethod
    def of(table: pa.Table) -> "_Columns":
        """Take the columns of a table. Raises one of _ERRORS if they cannot be used."""
        facts = table.column("facts").unify_dictionaries().combine_chunks()
        size, mtime_ns, sources = (table.column(name).to_numpy() for name in ("size", "mtime_ns", "sources"))
        places = dict(zip(table.column("name").to_pylist(), range(len(table)), strict=True))
        return _Columns(
            places, size, mtime_ns, sources, facts.indices.to_numpy(), facts.dictionary.to_pylist()
        )


def _read_columns(folder: Path, kind: str) -> _Columns:
    try:
        return _Columns.of(_read_table(folder, kind))
    except _ERRORS:
        return _Columns.of(_SCHEMA.empty_table())


def _read_table(folder: Path, kind: str | None = None) -> pa.Table:
    """Return the table of a folder; an empty one if there is none, or one that cannot be used.

    kind: only its rows.
    """
    path = folder / INDEX_NAME
    try:
        file = pa.BufferReader(path.read_bytes())
        # not `read_table`: it starts threads, which can end a program with "terminate called" at its exit
        with pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False) as opened:
            found = opened.schema_arrow
            if not found.equals(_SCHEMA) or (found.metadata or {}).get(_VERSION_KEY) != VERSION:
                raise ValueError("it is of another version")
            table = opened.read_row_groups(
                [group for group in range(opened.num_row_groups) if _has_kind(opened, group, kind)],
                use_threads=False,
            )
        if kind is not None:
            table = table.filter(pc.equal(table.column("kind"), kind))
        if any(column.null_count for column in table.columns):
            raise ValueError("values are missing")
        return table
    except FileNotFoundError:
        pass
    except _ERRORS as error:
        logger.info("%s cannot be used (%s); the entries are read instead", path, error)
    return _SCHEMA.empty_table()


def _has_kind(file: Any, group: int, kind: str | None) -> bool:
    """Whether a row group of a `ParquetFile` may have rows of a kind."""
    said = file.metadata.row_group(group).column(0).statistics
    return kind is None or said is None or not said.has_min_max or said.min <= kind <= said.max


def _as_table(kind: str, rows: Sequence[Row]) -> pa.Table:
    columns = dict(
        zip(("name", "size", "mtime_ns", "sources", "facts"), zip(*rows, strict=True), strict=True)
    )
    values = {"kind": [kind] * len(rows), **columns}
    return pa.table([pa.array(values[one.name], one.type) for one in _SCHEMA], schema=_SCHEMA)


def _is_kept(table: pa.Table, kind: str, there: Collection[str], noted: Collection[str]) -> list[bool]:
    """Return which rows still hold: entries that are there, and that there is nothing newer about."""
    names, kinds = table.column("name").to_pylist(), table.column("kind").to_pylist()
    names_there = set(there)
    return [
        name in names_there and not (name in noted and of_kind == kind)
        for name, of_kind in zip(names, kinds, strict=True)
    ]
