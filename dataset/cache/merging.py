"""Merge small shards at the end of a run, and reclaim removed entries: sorted, so that equal entries give
equal files.

A merged shard is named by its content. It gets its name, then the index follows, then its sources go: a kill
between any two of these leaves every entry in one shard or in two.
"""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from dataset.cache.catalog import (
    NOTHING,
    NOWHERE,
    Catalog,
    CatalogRow,
    open_catalog,
    read_index,
    write_index,
)
from dataset.cache.tar_records import (
    END,
    RecordKind,
    ShardRecord,
    encode_name,
    machine,
    padded,
    read_records,
    record_header,
    writer_of,
)
from dataset.shard_names import INDEX, is_of_shards
from modules.atomic_write import (
    LEFTOVER_SECONDS,
    atomic_path,
    explain_errors,
    parse_temporary,
    remove_leftovers,
)
from modules.file_locks import is_file_of, only_one, try_lock

logger = logging.getLogger(__name__)

SHARD_BYTES = 1 << 30  # a writer begins another shard when it has as many
SMALL = 0.5  # of these bytes: smaller ones are merged
MOST_HOLES = 0.25  # of a shard: what more is reclaimed
COPY_BYTES = 1 << 22
LOCK = ".cache-index.lock"  # is there while shards are merged

Rows = Sequence[tuple[str, CatalogRow]]


def merge_shards(folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Put a folder in order: at most one small shard, none that is unfinished or damaged, and an index.

    One process at a time does this: merged shards are named by their content, so two would use one name.
    Shards that others write or merge are left alone. Raises OutputError if there is no room for it; then all
    shards are as they were.
    """
    if not folder.is_dir() or _is_in_order(folder, shard_bytes * SMALL):
        return
    with explain_errors(folder / INDEX), only_one(folder / LOCK):
        remove_leftovers(folder, is_of_shards)
        with contextlib.ExitStack() as locks:
            locked = _lock_untidy(folder, shard_bytes * SMALL, locks)
            if locked:
                _merge(folder, shard_bytes, locked, locks)
        _renew_index(folder)


def _is_in_order(folder: Path, small_bytes: float) -> bool:
    """Whether there is nothing to do: then the folder need not be writable."""
    catalog = open_catalog(folder)
    small, untidy = _to_merge(catalog, small_bytes)
    if not catalog.has_index or untidy or len(small) > 1:
        return False
    found = (parse_temporary(name) for name in os.listdir(folder))
    return not (folder / LOCK).exists() and not any(one and is_of_shards(one.name) for one in found)


def _renew_index(folder: Path, without: Collection[str] = (), merged: Mapping[str, bool] = NOTHING) -> None:
    """Write the index, unless it is up to date. Shards that are being written have no place in it.

    without: shards that are about to go. merged: as for `open_catalog`.
    """
    catalog = open_catalog(folder)
    finished = {shard.name for shard in catalog.shards if shard.is_finished and not shard.damaged}
    finished -= set(without)
    if len(finished) < len(catalog.shards):
        catalog = open_catalog(folder, finished, merged)
    if not catalog.shards and not any(True for _ in catalog.rows()):
        (folder / INDEX).unlink(missing_ok=True)
    elif not catalog.has_index:
        write_index(folder, catalog)


def _lock_untidy(folder: Path, small_bytes: float, locks: contextlib.ExitStack) -> dict[str, BinaryIO]:
    """Lock the shards that are to be merged, if any has to be; those that others hold are left out."""
    catalog = open_catalog(folder)
    small, untidy = _to_merge(catalog, small_bytes)
    index = read_index(folder)
    listed = set() if index is None else {shard.name for shard in index.shards}
    locked = {}
    if untidy or len(small) > 1:
        for shard in catalog.shards:
            if shard.name in small | untidy:
                file = _lock(folder / shard.name, locks, shard.is_finished or shard.name in listed)
                if file is not None:
                    locked[shard.name] = file
    return locked if untidy & locked.keys() or len(small & locked.keys()) > 1 else {}


def _lock(path: Path, locks: contextlib.ExitStack, is_finished: bool) -> BinaryIO | None:
    """Open and lock a file that nobody else writes or merges; return None if somebody may."""
    try:
        file = locks.enter_context(path.open("rb+"))
        is_free = try_lock(file)
        found = os.fstat(file.fileno())
        # another process may have merged it before we had the lock
        is_there = is_file_of(path, file)
    except (FileNotFoundError, PermissionError):  # PermissionError: Windows, someone reads it
        return None
    if not is_finished and is_free is not False:
        # other machines' locks are not seen on every network share
        writer = writer_of(file)
        is_here = is_free and (writer is None or not set(writer.split()).isdisjoint(machine().split()))
        is_free = is_here or found.st_mtime < time.time() - LEFTOVER_SECONDS
    return file if is_there and is_free is not False else None


def _to_merge(catalog: Catalog, small_bytes: float) -> tuple[set[str], set[str]]:
    """Return the small shards, even a single one, and those that have to be merged."""
    small = {shard.name for shard in catalog.shards if shard.size < small_bytes and not shard.is_foreign}
    return small, _untidy(catalog, small)


def _untidy(catalog: Catalog, names: Collection[str]) -> set[str]:
    """Return the shards that are unfinished, damaged or full of holes, and small ones in another order.

    names: of the small ones.
    """
    untidy, alive = set(), catalog.entry_bytes()
    for number, shard in enumerate(catalog.shards):
        if shard.name in names:
            rows = _sorted(list(catalog.rows({number})))
            has_holes = shard.size != _total(rows) or shard.name != shard_name(rows)
        else:  # what says that something was removed is a hole too
            has_holes = alive[number] < shard.size * (1 - MOST_HOLES)
        if not shard.is_foreign and (has_holes or not shard.is_finished or shard.damaged):
            untidy.add(shard.name)
    return untidy


def _merge(
    folder: Path, shard_bytes: int, locked: Mapping[str, BinaryIO], locks: contextlib.ExitStack
) -> None:
    """Write the valid entries of the locked shards to new ones, then remove the locked ones."""
    catalog = open_catalog(folder)
    numbers = {number for number, shard in enumerate(catalog.shards) if shard.name in locked}
    held = list(catalog.rows(numbers))
    order, kept = _removal_order(catalog, numbers, held, _copies(folder, catalog, held))
    # what no other shard knows starts anew, so that equal entries give equal bytes
    rows = [
        (name, row if name in kept else row._replace(generation=0))
        for name, row in held
        if row.kind is not RecordKind.REMOVED or name in kept
    ]
    written = set()
    with contextlib.ExitStack() as writes:  # the new ones get their names together
        for chunk in _chunks(_sorted(rows), shard_bytes):
            name = shard_name(chunk)
            written.add(name)
            if not _is_already(catalog, name, chunk):
                temporary = writes.enter_context(atomic_path(folder / name, _total(chunk)))
                _write_shard(temporary, chunk, catalog, locked)
        if os.name == "nt":  # which replaces and removes no file that is open
            locks.close()
    gone = [name for name in order if name not in written]
    logger.debug("%s: %d shards were merged into %d", folder, len(locked), len(written))
    _renew_index(folder, gone, {name: row.kind is RecordKind.ENTRY for name, row in held})
    for name in gone:
        # on a volume without locks another merge may have made one of this name meanwhile
        if os.name == "nt" or is_file_of(folder / name, locked[name]):
            (folder / name).unlink(missing_ok=True)


def _is_already(catalog: Catalog, name: str, rows: Rows) -> bool:
    """Whether a shard holds just these records: its own ones, not others with equal names and checksums."""
    number, shard = next(
        ((number, one) for number, one in enumerate(catalog.shards) if one.name == name), (NOWHERE, None)
    )
    return (
        shard is not None
        and shard.is_finished
        and not shard.damaged
        and shard.size == _total(rows)
        and all(row.shard == number for _, row in rows)
    )


def _copies(folder: Path, catalog: Catalog, rows: Rows) -> Mapping[str, set[int]]:
    """Return which shards know something of the names that were removed or replaced."""
    copies: dict[str, set[int]] = {
        name: set() for name, row in rows if row.kind is RecordKind.REMOVED or row.generation
    }
    for number, shard in enumerate(catalog.shards):
        if not copies:
            break
        with contextlib.suppress(FileNotFoundError), (folder / shard.name).open("rb") as file:
            for record in read_records(file, shard.size):
                if isinstance(record, ShardRecord) and record.name in copies:
                    copies[record.name].add(number)
    return copies


def _removal_order(
    catalog: Catalog, numbers: set[int], rows: Rows, copies: Mapping[str, set[int]]
) -> tuple[list[str], set[str]]:
    """Return in which order merged shards go, and the names whose generations have to be kept.

    A shard goes when all others have gone that say something else of its names: a kill between two of them
    must bring nothing back. Names are kept that shards outside of the merge know too, or for which no order
    is right.
    """
    kept = {name for name, found in copies.items() if found - numbers}
    names: dict[int, list[str]] = {number: [] for number in numbers}  # that hold in a shard, not in others
    for name, row in rows:
        if name in copies and name not in kept and copies[name] - {row.shard}:
            names[row.shard].append(name)
    earlier = {number: set[int]().union(*(copies[name] for name in names[number])) for number in numbers}
    order: list[str] = []
    left = sorted(numbers, key=lambda number: catalog.shards[number].name)
    while left:
        others = set(left)
        number = next((one for one in left if not earlier[one] & others - {one}), left[0])
        left.remove(number)
        order.append(catalog.shards[number].name)
        kept |= {name for name in names[number] if copies[name] & others - {number}}
    return order, kept


def _sorted(rows: Rows) -> Rows:
    return sorted(rows, key=lambda pair: encode_name(pair[0]))


def shard_name(rows: Rows) -> str:
    """Return the name of a shard that holds these records in this order, and nothing else."""
    content = hashlib.sha256()
    for name, row in rows:
        content.update(record_header(name, row.kind, row.generation, row.length, row.crc32))
    return f"cache-{content.hexdigest()[:16]}.tar"


def _record_bytes(name: str, row: CatalogRow) -> int:
    return len(record_header(name, row.kind, row.generation, row.length, row.crc32)) + padded(row.length)


def _total(rows: Rows) -> int:
    return sum(_record_bytes(name, row) for name, row in rows) + len(END)


def _chunks(rows: Rows, shard_bytes: int) -> Iterator[Rows]:
    """Yield rows in groups that make one shard."""
    chunk: list[tuple[str, CatalogRow]] = []
    size = 0
    for name, row in rows:
        chunk.append((name, row))
        size += _record_bytes(name, row)
        if size >= shard_bytes:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _write_shard(path: Path, rows: Rows, catalog: Catalog, locked: Mapping[str, BinaryIO]) -> None:
    with path.open("wb") as file:
        try_lock(file)  # so that nobody takes it for a leftover
        for name, row in rows:
            file.write(record_header(name, row.kind, row.generation, row.length, row.crc32))
            if row.kind is RecordKind.ENTRY:
                _copy(locked[catalog.shards[row.shard].name], row.offset, row.length, file)
                file.write(bytes(padded(row.length) - row.length))
        file.write(END)


def _copy(source: BinaryIO, offset: int, count: int, target: BinaryIO) -> None:
    """Copy bytes as they are: damaged ones keep a checksum that does not fit, and are found again."""
    source.seek(offset)
    while count:
        data = source.read(min(count, COPY_BYTES))
        if not data:
            raise OSError("a shard became shorter while it was merged")
        target.write(data)
        count -= len(data)
