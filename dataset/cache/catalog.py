"""Entries of a folder of shards, and their places: columns for those that the index knew, rows for the rest.

The index, one Parquet file per folder, is only a copy of the shards' headers. A shard that it does not know,
or of another size, is read by its headers.
"""

import json
import logging
import os
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataset.cache.tar_records import (
    BLOCK,
    Damage,
    RecordKind,
    ShardRecord,
    decode_name,
    encode_name,
    has_bad_characters,
    is_foreign,
    padded,
    read_records,
)
from dataset.shard_names import INDEX, SHARD
from modules.atomic_write import atomic_path
from modules.errors import CacheError
from modules.file_locks import try_lock

logger = logging.getLogger(__name__)

INDEX_KEY = b"reelsmith_shards"  # of its metadata: the shards that it describes, with their sizes
INDEX_VERSION = 1
USUAL_HEADER = 3 * BLOCK  # of an entry whose name is short
NOTHING: Mapping[str, bool] = MappingProxyType({})
NOWHERE = -1  # instead of a shard's number
NUMBERS: Mapping[str, Any] = {  # the columns beside the names
    "shard": np.int32,
    "offset": np.int64,
    "length": np.int64,
    "crc32": np.uint32,
    "generation": np.int32,
    "kind": np.int8,
}


class CatalogRow(NamedTuple):
    """Facts about a name."""

    shard: int  # its place in `Catalog.shards`, or NOWHERE
    offset: int
    length: int
    crc32: int
    generation: int
    kind: RecordKind


@dataclass
class Shard:
    """Facts about one shard."""

    name: str
    size: int  # when it was last looked at
    position: int  # behind its last whole record
    is_finished: bool
    is_foreign: bool = False  # no shard at all, or one of another version: it is left alone
    damaged: list[Damage] = field(default_factory=list)


@dataclass(frozen=True)
class Columns:
    """Rows sorted by the bytes of their names. Shards are places in a list beside them."""

    names: bytes
    ends: np.ndarray  # int64, one more than rows: where each name begins
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    crc32: np.ndarray
    generation: np.ndarray
    kind: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)

    def name(self, place: int) -> str:
        """Return the name of a row."""
        return decode_name(self.names[self.ends[place] : self.ends[place + 1]])

    def find(self, name: str) -> int | None:
        """Return the place of a name."""
        wanted, low, high = encode_name(name), 0, len(self)
        while low < high:
            middle = (low + high) // 2
            found = self.names[self.ends[middle] : self.ends[middle + 1]]
            if found == wanted:
                return middle
            low, high = (middle + 1, high) if found < wanted else (low, middle)
        return None

    def row(self, place: int) -> CatalogRow:
        """Return a row."""
        return CatalogRow(
            int(self.shard[place]),
            int(self.offset[place]),
            int(self.length[place]),
            int(self.crc32[place]),
            int(self.generation[place]),
            RecordKind(int(self.kind[place])),
        )

    def of_shards(self, numbers: Mapping[int, int]) -> "Columns":
        """Return the rows of some shards, which get new numbers."""
        table = np.full(int(self.shard.max(initial=0)) + 2, NOWHERE, np.int32)
        for old, new in numbers.items():
            if old < len(table):
                table[old] = new
        shard = table[self.shard]
        kept = np.flatnonzero(shard != NOWHERE)
        if len(kept) == len(self):
            names, ends = self.names, self.ends
        else:
            pieces = [self.names[self.ends[place] : self.ends[place + 1]] for place in kept.tolist()]
            names, ends = b"".join(pieces), np.cumsum([0, *map(len, pieces)], dtype=np.int64)
        return Columns(
            names,
            ends,
            shard[kept],
            *(getattr(self, name)[kept] for name in list(NUMBERS)[1:]),
        )


def make_columns(rows: Mapping[str, CatalogRow]) -> Columns:
    """Return rows as columns."""
    order = sorted((encode_name(name), row) for name, row in rows.items())
    values = [row for _, row in order]
    return Columns(
        b"".join(name for name, _ in order),
        np.cumsum([0, *(len(name) for name, _ in order)], dtype=np.int64),
        *(np.array([getattr(row, name) for row in values], dtype) for name, dtype in NUMBERS.items()),
    )


@dataclass
class Catalog:
    """The entries of a folder, as they were when it was last looked at, with those added since."""

    shards: list[Shard] = field(default_factory=list)
    known: Columns = field(default_factory=lambda: make_columns({}))
    added: dict[str, CatalogRow] = field(
        default_factory=dict
    )  # instead of those of the same names in `known`
    has_index: bool = False  # whether the index says just this

    def get(self, name: str) -> CatalogRow | None:
        """Return the facts about a name, removed and lost ones too."""
        row = self.added.get(name)
        if row is None:
            place = self.known.find(name)
            row = None if place is None else self.known.row(place)
        return row

    def there(self, name: str) -> CatalogRow | None:
        """Return the row of an entry, a lost one too."""
        row = self.get(name)
        return None if row is None or row.kind is RecordKind.REMOVED else row

    def rows(self, shards: Collection[int] | None = None) -> Iterator[tuple[str, CatalogRow]]:
        """Yield names with their facts, in no order. shards: only those whose rows are in these."""
        places: Sequence[int] = range(len(self.known))
        if shards is not None:
            places = np.flatnonzero(np.isin(self.known.shard, list(shards))).tolist()
        for place in places:
            name = self.known.name(place)
            if name not in self.added:
                yield name, self.known.row(place)
        for name, row in self.added.items():
            if shards is None or row.shard in shards:
                yield name, row

    def entry_bytes(self) -> list[int]:
        """Return how many bytes the entries of each shard have, whole blocks with usual headers."""
        sizes = [0] * len(self.shards)
        is_entry = self.known.kind == RecordKind.ENTRY
        padded_sizes = -(-self.known.length[is_entry] // BLOCK) * BLOCK + USUAL_HEADER
        if is_entry.any():
            shards = self.known.shard[is_entry]
            sizes = np.bincount(shards, padded_sizes, len(self.shards)).astype(np.int64).tolist()
        for name, row in self.added.items():
            place = self.known.find(name)
            if place is not None and is_entry[place]:
                then = self.known.row(place)
                sizes[then.shard] -= padded(then.length) + USUAL_HEADER
            if row.kind is RecordKind.ENTRY:
                sizes[row.shard] += padded(row.length) + USUAL_HEADER
        return sizes

    def names(self) -> Collection[str]:
        """Return a new set of the names of entries, lost ones too."""
        ends, names = self.known.ends.tolist(), self.known.names
        places = zip(ends, ends[1:], strict=False)
        if names.isascii():
            text = names.decode("ascii")  # slices of a text are twice as fast
            found = {text[start:end] for start, end in places}
        else:
            found = {decode_name(names[start:end]) for start, end in places}
        for place in np.flatnonzero(self.known.kind == RecordKind.REMOVED).tolist():
            found.discard(self.known.name(place))
        for name, row in self.added.items():
            if row.kind is RecordKind.REMOVED:
                found.discard(name)
            else:
                found.add(name)
        return found

    def put(self, name: str, row: CatalogRow) -> None:
        """Add a row, if it wins against an earlier one of its name."""
        old = self.get(name)
        if old is None or self._rank(row) > self._rank(old):
            self.added[name] = row

    def lost(self) -> list[str]:
        """Return the names of the entries that are lost, sorted."""
        places = np.flatnonzero(self.known.kind == RecordKind.LOST).tolist()
        found = {self.known.name(place) for place in places} - self.added.keys()
        return sorted(found | {name for name, row in self.added.items() if row.kind is RecordKind.LOST})

    def _rank(self, row: CatalogRow) -> tuple[Any, ...]:
        """Return the rank between rows of a name, without clocks. Equal ones mostly have equal contents."""
        shard = "" if row.shard == NOWHERE else self.shards[row.shard].name
        return row.generation, -row.kind, row.crc32, shard, row.offset

    def grow(self, folder: Path, sizes: Mapping[str, int]) -> None:
        """Read what was appended to shards, and new ones."""
        numbers = {shard.name: number for number, shard in enumerate(self.shards)}
        for name in sorted(sizes):
            if name not in numbers:
                numbers[name] = len(self.shards)
                self.shards.append(Shard(name, size=0, position=0, is_finished=False))
            number = numbers[name]
            if sizes[name] != self.shards[number].size:
                self.has_index = False
                self._scan(folder, number)

    def _scan(self, folder: Path, number: int) -> None:
        shard = self.shards[number]
        has_records = shard.position > 0
        try:
            with (folder / shard.name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                for found in read_records(file, size, shard.position):
                    if isinstance(found, ShardRecord):
                        has_records = True
                        row = (number, found.offset, found.length, found.crc32, found.generation, found.kind)
                        self.put(found.name, CatalogRow(*row))
                    elif isinstance(found, Damage):
                        shard.damaged.append(found)
                    else:
                        shard.position, shard.is_finished = found.position, found.is_finished
                shard.size, shard.is_foreign = size, not has_records and is_foreign(file)
        except FileNotFoundError:  # merged by another process meanwhile: what took its place is there
            shard.size, shard.is_finished = 0, True
        except OSError as error:
            raise CacheError(f"{folder / shard.name} cannot be read: {error.strerror or error}") from error

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Whether the shards that are there can be those of this catalog, grown or more of them."""
        return all(sizes.get(shard.name, -1) >= shard.size for shard in self.shards)


def list_shards(folder: Path) -> dict[str, int]:
    """Return the sizes of a folder's shards by their names."""
    found = {}
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                if SHARD.fullmatch(entry.name) and entry.is_file():
                    try:
                        found[entry.name] = entry.stat().st_size
                    except FileNotFoundError:  # merged meanwhile
                        continue
    return found


def open_catalog(
    folder: Path, only: Collection[str] | None = None, merged: Mapping[str, bool] = NOTHING
) -> Catalog:
    """Look at a folder. only: the names of the shards to read. merged: names that have just been merged, and
    whether they still are entries, so that their generation began anew.

    Entries that the index lists in a shard that is cut or gone, and that no other shard has, are lost: they
    are remembered, so that nobody trains on less unawares.
    """
    index = read_index(folder)
    sizes = list_shards(folder)
    if index is not None and not {shard.name for shard in index.shards} <= sizes.keys():
        # shards were merged between the two: their index was written before they went
        index, sizes = read_index(folder), list_shards(folder)
    if only is not None:
        sizes = {name: size for name, size in sizes.items() if name in only}
    if index is None:
        catalog = Catalog()
        catalog.grow(folder, sizes)
        return catalog
    right = [number for number, shard in enumerate(index.shards) if sizes.get(shard.name) == shard.size]
    if len(right) == len(index.shards):
        index.grow(folder, sizes)
        return index
    catalog = Catalog([index.shards[number] for number in right])
    catalog.known = index.known.of_shards({old: new for new, old in enumerate(right)})
    catalog.grow(folder, sizes)
    wrong = set(range(NOWHERE, len(index.shards))) - set(right)
    then = {name: row for name, row in index.rows(wrong) if row.kind is not RecordKind.REMOVED}
    if _missing(catalog, then, merged):
        # the index says of each name only what holds: the shards that it knows may have other copies
        catalog = Catalog()
        catalog.grow(folder, sizes)
        for name in _missing(catalog, then, merged):
            catalog.added[name] = CatalogRow(NOWHERE, 0, 0, 0, 0, RecordKind.LOST)
    return catalog


def _missing(catalog: Catalog, then: Mapping[str, CatalogRow], merged: Mapping[str, bool]) -> list[str]:
    """Return the entries that are gone, or of which only an earlier version is left."""
    missing = []
    for name, row in then.items():
        now = catalog.get(name)
        if now is None:
            is_missing = merged.get(name, True)
        else:
            is_missing = now.generation < row.generation and name not in merged
        if is_missing:
            missing.append(name)
    return missing


def read_index(folder: Path) -> Catalog | None:
    """Read the index of a folder; None if it has none, or one that cannot be used."""
    path = folder / INDEX
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s cannot be read (%s); the shards are read instead", path, error)
        return None
    try:
        catalog = _parse_index(data)
        pa.default_memory_pool().release_unused()  # it was read twice as large as it is
        return catalog
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        logger.warning("%s is damaged (%s); the shards are read instead", path, error)
        return None


def _parse_index(data: bytes) -> Catalog:
    # not `read_table`: it starts threads, which can end a program with "terminate called" at its exit
    with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, pre_buffer=False) as file:
        table = file.read(use_threads=False)
    content = json.loads((table.schema.metadata or {})[INDEX_KEY])
    if content["version"] != INDEX_VERSION:
        raise ValueError(f"it has version {content['version']}, this program knows version {INDEX_VERSION}")
    shards = [Shard(str(name), int(size), int(size), is_finished=True) for name, size in content["shards"]]
    if not all(SHARD.fullmatch(shard.name) for shard in shards):
        raise ValueError("it names files that are no shards")
    names = table.column("name").combine_chunks()
    names = names.chunk(0) if isinstance(names, pa.ChunkedArray) and names.num_chunks else names
    if len(table) == 0:
        if content["check"] != _check(make_columns({})):
            raise ValueError("its rows are missing")
        return Catalog(shards, has_index=True)
    _, ends, text = names.buffers()
    offsets = np.frombuffer(ends, np.int64)[names.offset : names.offset + len(names) + 1].copy()
    whole = text.to_pybytes()
    numbers = (table.column(name).to_numpy().astype(dtype) for name, dtype in NUMBERS.items())
    columns = Columns(whole, offsets, *numbers)
    if content["check"] != _check(columns):
        raise ValueError("its rows do not match their checksum")
    if columns.shard.max() >= len(shards) or columns.shard.min() < NOWHERE or columns.length.min() < 0:
        raise ValueError("its rows lie in shards that it does not list")
    if columns.offset.min() < 0 or not set(np.unique(columns.kind).tolist()) <= set(RecordKind):
        raise ValueError("its rows have impossible values")
    if has_bad_characters(whole):
        raise ValueError("its rows have impossible names")
    return Catalog(shards, columns, has_index=True)


def _check(columns: Columns) -> int:
    """Return the checksum of all rows. Parquet's own do not cover how many there are."""
    check = zlib.crc32(columns.names)
    for name in ("ends", *NUMBERS):
        check = zlib.crc32(np.ascontiguousarray(getattr(columns, name)).data, check)
    return check


def write_index(folder: Path, catalog: Catalog) -> None:
    """Write the index of a folder from a catalog of finished shards. Raises OutputError."""
    order = sorted(range(len(catalog.shards)), key=lambda number: catalog.shards[number].name)
    numbers = {old: new for new, old in enumerate(order)} | {NOWHERE: NOWHERE}
    rows = {name: row._replace(shard=numbers[row.shard]) for name, row in catalog.rows()}
    columns = make_columns(rows)
    names = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(columns), [None, pa.py_buffer(columns.ends), pa.py_buffer(columns.names)]
    )
    shards = [[catalog.shards[number].name, catalog.shards[number].size] for number in order]
    said = json.dumps({"version": INDEX_VERSION, "shards": shards, "check": _check(columns)})
    table = pa.table(
        {"name": names, **{name: getattr(columns, name) for name in NUMBERS}},
        metadata={INDEX_KEY: said.encode()},
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    content = sink.getvalue().to_pybytes()
    with atomic_path(folder / INDEX, len(content)) as temporary, temporary.open("wb") as file:
        try_lock(file)  # so that nobody takes it for a leftover
        file.write(content)
