"""Parquet files that others made: opened, bounded in what they unpack to, and files in their columns.

A few bytes may stand for a gigabyte of text in each row: equal texts are read once, and counted before they
become rows.
"""

import bisect
import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from dataset.sources.media_source import ParquetCell
from modules.errors import DatasetError, MediaError
from modules.text_files import require_regular_file

SUFFIXES = (".parquet", ".pq")
LEAST_BYTES = 1 << 26  # that any file may unpack to
MOST_TIMES = 1000  # its size, that a larger one may; texts that are all alike shrink that far
ROW_BYTES, VALUE_BYTES = 256, 16  # in memory of a row, and of a value, besides what it says
MOST_GROUP_BYTES = 1 << 31  # of a column in a row group, which is read as a whole
_ONE_AT_A_TIME = threading.Lock()  # else all threads that begin would read, and hold, the same row group
_MAGIC = ((b"GIF8", ".gif"), (b"RIFF", ".webp"))  # of files whose name counts: they may be animations


def parquet_parts(path: Path) -> list[Path]:
    """Return the file itself, or the parts in a folder, by name. Raises DatasetError if it has none."""
    if not path.is_dir():
        return [path]
    parts = sorted(
        part
        for part in path.iterdir()
        if part.suffix.lower() in SUFFIXES and not part.name.startswith((".", "_"))
    )
    if not parts:
        raise DatasetError(
            f"{path} is a folder without .parquet files. Name a .parquet, .csv, .tsv or .jsonl file, or a "
            "folder of .parquet parts."
        )
    return parts


@contextlib.contextmanager
def open_parquet(path: Path, repeating: Sequence[str] = ()) -> Iterator[Any]:
    """Open a Parquet file (a pyarrow `ParquetFile`). repeating: columns whose equal texts are held once.

    Raises DatasetError if it cannot be read, there or in the block.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DatasetError(f"{path} needs the package pyarrow: pip install pyarrow") from None
    try:
        require_regular_file(path)
        with parquet.ParquetFile(path, read_dictionary=repeating) as file:
            yield file
    except (OSError, ArrowException, ValueError) as error:  # ValueErrors: damaged data, names not in UTF-8
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DatasetError(
            f"{path} cannot be read as Parquet: {reason}. Correct the path, or write it again."
        ) from error


# --- what a file unpacks to
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Unpacking:
    """Counter of the bytes unpacked from a file."""

    path: Path
    most_bytes: int
    found_bytes: int = 0

    @staticmethod
    def of(path: Path) -> "Unpacking":
        """Begin for a file. Raises OSError if it is gone."""
        return Unpacking(path, LEAST_BYTES + MOST_TIMES * path.stat().st_size)

    def add(self, size_bytes: int) -> None:
        """Count bytes about to be unpacked. Raises DatasetError if they are far too many for the file."""
        self.found_bytes += size_bytes
        if self.found_bytes > self.most_bytes:
            raise DatasetError(
                f"{self.path}: a file of {self.path.stat().st_size:,} bytes that unpacks to more than "
                f"{self.most_bytes >> 20:,} MiB is damaged, or made to fill the memory. Write it again from "
                "its source."
            )


def largest_value(file: Any, limit: Unpacking, group: int, columns: Collection[str]) -> int:
    """Return the size in bytes that each value of some columns of a row group may have; 0 if a few bytes in
    the file cannot stand for a long value in every row.

    file: a `ParquetFile`. limit: counter for this row group. columns: with all that is in them. Raises
    DatasetError if the columns are too much.
    """
    chunks, largest, wanted = file.metadata.row_group(group), 0, set(columns)
    for number in range(chunks.num_columns):
        chunk = chunks.column(number)
        if not wanted.isdisjoint(accumulate(chunk.path_in_schema.split("."), "{}.{}".format)):
            limit.add(chunk.total_uncompressed_size + chunk.num_values * VALUE_BYTES)
            repeats = "DELTA_BYTE_ARRAY" in chunk.encodings  # values begin as the one before
            largest = max(largest, file.schema.column(number).length)
            largest = max(largest, chunk.total_uncompressed_size) if repeats else largest
    return largest


# --- images and clips in a column, as the Hugging Face hub stores them
# ------------------------------------------------------------------------------------------------------------


def cell_column(path: Path, name: str) -> str | None:
    """Return which column holds the bytes of `name`: itself, or `name.bytes`; None if there are none."""
    from pyarrow import types

    with open_parquet(path) as file:
        schema = file.schema_arrow
        if name not in schema.names:
            return None
        kind = schema.field(name).type
        if types.is_struct(kind) and "bytes" in (inner := [one.name for one in kind]):
            name, kind = f"{name}.bytes", kind.field(inner.index("bytes")).type
        return name if types.is_binary(kind) or types.is_large_binary(kind) else None


def cells_of(path: Path, column: str) -> Callable[[int], ParquetCell]:
    """Return the function row, counted from 1 -> its place in a Parquet file. column: of `cell_column`.

    Raises DatasetError if its row groups are too large to read one at a time.
    """
    with open_parquet(path) as file:
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        for group in groups:
            sizes = [group.column(index) for index in range(group.num_columns)]
            size = sum(one.total_uncompressed_size for one in sizes if one.path_in_schema == column)
            if size > MOST_GROUP_BYTES:
                raise DatasetError(
                    f"{path}: a row group holds {size / 1e9:.1f} GB of {column}, at most "
                    f"{MOST_GROUP_BYTES / 1e9:.1f} GB are read at a time. Write it again with "
                    "row_group_size=100."
                )
        starts = list(accumulate((group.num_rows for group in groups), initial=0))

    def place(number: int) -> ParquetCell:
        group = bisect.bisect_right(starts, number - 1) - 1
        return ParquetCell(path, group, number - 1 - starts[group], column)

    return place


def read_cell(origin: ParquetCell) -> bytes:
    """Return the bytes of a cell. Raises MediaError if it is empty or cannot be read."""
    where = f"{origin.file}, row {origin.row + 1} of row group {origin.group + 1}"
    try:
        stamp = origin.file.stat().st_mtime_ns
        with _ONE_AT_A_TIME:
            group = _group(origin.file, origin.group, origin.column, stamp)
        content = group[origin.row].as_py()
    except OSError as error:
        raise MediaError(f"{where}: it cannot be read: {error.strerror or error}") from error
    except (DatasetError, ValueError, IndexError) as error:
        raise MediaError(f"{where}: it cannot be read: {error}") from error
    if not content:
        raise MediaError(f"{where}: {origin.column} is empty there")
    return bytes(content)


def cell_suffix(content: bytes) -> str:
    """Return the suffix of a file with this content if it counts, or ""."""
    return next((suffix for magic, suffix in _MAGIC if content.startswith(magic)), "")


@lru_cache(maxsize=2)  # sources are read in the order of rows
def _group(path: Path, group: int, column: str, mtime_ns: int) -> Any:
    """Return a column of a row group. mtime_ns: so that a file that was written again is read again."""
    with open_parquet(path, [column]) as file:
        pages = Unpacking.of(path)
        pages.most_bytes = min(pages.most_bytes, MOST_GROUP_BYTES)
        largest_value(file, pages, group, [column])
        found = file.read_row_group(group, columns=[column], use_threads=False).column(0)
    if "." in column and hasattr(found.type, "num_fields") and found.type.num_fields:
        import pyarrow.compute as pc

        found = pc.struct_field(found, column.rpartition(".")[2])
    found.validate(full=True)  # places in a dictionary are not looked at else
    return found
