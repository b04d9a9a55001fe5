"""Parquet files of unknown origin: opening them, limits of their unpacked size, and files in their columns.

A few bytes may unpack to a gigabyte of text in each row. Sizes in the metadata may be wrong, so the header of
each page is read before pyarrow unpacks it. Source: github.com/apache/parquet-format, parquet.thrift
(Apache-2.0), and Thrift's compact protocol.
"""

import bisect
import contextlib
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from dataset.forms.contract import FindCell
from dataset.forms.parquet_parts import parquet_parts
from modules.errors import DatasetError, MediaError
from modules.limits import MAX_GROUP_BYTES, MAX_UNPACKED_TIMES, MIN_UNPACKED_BYTES
from modules.text_files import require_regular_file
from modules.varints import read_varint

ROW_BYTES, VALUE_BYTES = 256, 16  # memory overhead of a row, and of a value
# bytes to read of a page header with its statistics; the last one is pyarrow's own limit
_HEADERS = (1 << 12, 1 << 16, 1 << 20, 1 << 24)
_DICTIONARY_PAGE, _DELTA_BYTE_ARRAY = 2, 7  # a page type (PageType), and an encoding (Encoding)
# field ids in a page's header (PageHeader): type, sizes, and the structs of the two kinds of data pages
_TYPE, _UNPACKED, _PACKED, _DATA, _DATA_V2 = 1, 2, 3, 5, 8
_NUM_VALUES = 1  # field id in both structs of data pages
_ENCODINGS = {_DATA: 2, _DATA_V2: 4}  # field id of the encoding in these structs
# types in Thrift's compact protocol
_BINARY, _STRUCT = 8, 12
_INTEGERS = (4, 5, 6)  # i16, i32, i64
_BOOLEANS = (1, 2)  # true and false; they have no further bytes
_ONE_AT_A_TIME = threading.Lock()  # otherwise all threads would load the same row group at once


@contextlib.contextmanager
def open_parquet(path: Path, dictionary_columns: Sequence[str] = ()) -> Iterator[Any]:
    """Open a Parquet file as pyarrow's `ParquetFile`, and convert errors in the block to DatasetError.

    Equal strings in `dictionary_columns` are stored only once in memory.

    Raises:
        DatasetError: If the file cannot be opened, or if reading it in the block fails.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DatasetError(f"{path} needs the package pyarrow: pip install pyarrow") from None
    try:
        require_regular_file(path)
        with parquet.ParquetFile(path, read_dictionary=dictionary_columns) as file:
            yield file
    except (OSError, ArrowException, ValueError) as error:  # ValueErrors: damaged data, names not in UTF-8
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DatasetError(
            f"{path} cannot be read as Parquet: {reason}. Correct the path, or write the file again."
        ) from error


# --- limits of the unpacked size
# ------------------------------------------------------------------------------------------------------------


@dataclass
class UnpackedBytesLimit:
    """Counter of the bytes that were unpacked from a file, to stop decompression bombs."""

    path: Path
    max_bytes: int
    num_bytes: int = 0

    @staticmethod
    def of(path: Path) -> "UnpackedBytesLimit":
        """Return a counter for a file; its limit is proportional to the file size, with a minimum.

        Raises:
            OSError: If the file does not exist.
        """
        return UnpackedBytesLimit(path, MIN_UNPACKED_BYTES + MAX_UNPACKED_TIMES * path.stat().st_size)

    def add(self, size_bytes: int) -> None:
        """Count bytes before they are unpacked.

        Raises:
            DatasetError: If the limit is exceeded.
        """
        self.num_bytes += size_bytes
        if self.num_bytes > self.max_bytes:
            raise DatasetError(
                f"{self.path}: a file of {self.path.stat().st_size:,} bytes that unpacks to more than "
                f"{self.max_bytes >> 20:,} MiB is damaged, or made to fill the memory. Write it again from "
                "its source."
            )


def measure_row_group(file: Any, limit: UnpackedBytesLimit, group: int, columns: Collection[str]) -> int:
    """Check the unpacked size of some columns of a row group; return an upper bound for one value, in bytes.

    A small damaged or malicious file could unpack to any size. Values may also refer to pages with
    dictionaries or prefixes, so each row could be as large as such a page.

    Args:
        file: A `ParquetFile`.
        limit: Counter for the pages of this row group; raises if they are too large.
        group: Index of the row group.
        columns: Names of columns, including nested ones.

    Returns:
        The size of the largest such page, or of the largest value of a fixed length; 0 if there is neither.

    Raises:
        DatasetError: If the decompressed pages would be too large.
        ValueError: If the pages are damaged.
        OSError: If the file cannot be read.
    """
    chunks = file.metadata.row_group(group)
    largest = 0
    names = set(columns)
    with limit.path.open("rb") as content:
        for index in range(chunks.num_columns):
            chunk = chunks.column(index)
            # the column `image.bytes` belongs to the struct `image`: it counts if either is in `columns`
            prefixes = accumulate(chunk.path_in_schema.split("."), "{}.{}".format)
            if not names.isdisjoint(prefixes):
                # each value takes memory in addition to its page
                limit.add(chunk.num_values * VALUE_BYTES)
                fixed_length = file.schema.column(index).length
                largest = max(largest, fixed_length, _check_pages(content, chunk, limit))
    return largest


def _check_pages(content: Any, chunk: Any, limit: UnpackedBytesLimit) -> int:
    """Add the unpacked sizes of a column chunk's pages to `limit`, which raises if they are too large."""
    # The page headers are read, because the sizes in the footer may be wrong. A column chunk is a sequence of
    # pages: at most one dictionary, then data pages, each with a header in front.
    largest = 0
    num_values = 0
    offset = chunk.data_page_offset
    if chunk.dictionary_page_offset is not None:
        offset = min(offset, chunk.dictionary_page_offset)
    end = offset + chunk.total_compressed_size
    while offset < end and num_values < chunk.num_values:
        header, header_size = _read_header(content, offset)
        unpacked_size = _read_size(header, _UNPACKED)
        packed_size = _read_size(header, _PACKED)
        limit.add(unpacked_size)
        count, is_referred_to = _read_page_kind(header)
        # `measure_row_group` has counted chunk.num_values; a damaged page may have more
        limit.add(max(0, count - chunk.num_values) * VALUE_BYTES)
        num_values += count
        if is_referred_to:
            largest = max(largest, unpacked_size)
        offset += header_size + packed_size
    return largest


def _read_page_kind(header: dict[int, Any]) -> tuple[int, bool]:
    """Return the number of values in a page, and whether values refer to its bytes."""
    # Values refer to a dictionary, which has no values of its own, or to earlier strings of a page whose
    # prefixes they share.
    data_page = next((field for field in _ENCODINGS if isinstance(header.get(field), dict)), None)
    is_dictionary = header.get(_TYPE) == _DICTIONARY_PAGE
    if data_page is None:
        return 0, is_dictionary
    encoding = header[data_page].get(_ENCODINGS[data_page])
    return _read_size(header[data_page], _NUM_VALUES), is_dictionary or encoding == _DELTA_BYTE_ARRAY


def _read_size(fields: dict[int, Any], field: int) -> int:
    """Return a size or count in a header. Raises ValueError if it is missing or negative."""
    number = fields.get(field)
    if not isinstance(number, int) or number < 0:
        raise ValueError("a page without a size")
    return number


def _read_header(content: Any, offset: int) -> tuple[dict[int, Any], int]:
    """Return the fields of the page header at an offset, and its size in bytes."""
    for maximum in _HEADERS:
        content.seek(offset)
        data = content.read(maximum)
        try:
            return _read_struct(memoryview(data), 0)
        except IndexError:  # the header is longer than `data`
            if len(data) < maximum:  # the file ends in it
                break
    raise ValueError("a page is cut short")


def _read_struct(data: memoryview, position: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Parse a struct of Thrift's compact protocol that begins at a position of `data`."""
    # Each field begins with a byte: its upper half is the difference to the previous field id (0: the id
    # follows), its lower half the type. A zero byte ends the struct.
    if depth > 4:  # a page's header has a struct for its kind, which has one of statistics
        raise ValueError("a page's header is damaged")
    values: dict[int, Any] = {}
    field = 0
    while data[position]:
        difference = data[position] >> 4
        kind = data[position] & 15
        position += 1
        if difference:
            field += difference
        else:
            field, position = _read_signed(data, position)
        if kind == _STRUCT:
            values[field], position = _read_struct(data, position, depth + 1)
        elif kind in _INTEGERS:
            values[field], position = _read_signed(data, position)
        elif kind == _BINARY:
            size, position = read_varint(data, position)
            position += size
        elif kind not in _BOOLEANS:  # the type of a boolean is its value: no bytes follow
            raise ValueError("a page's header is damaged")
    return values, position + 1


def _read_signed(data: memoryview, position: int) -> tuple[int, int]:
    """Return a signed integer (a zigzag varint) at a position, and the position after it."""
    number, position = read_varint(data, position)
    return (number >> 1) ^ -(number & 1), position


# --- images and clips in a column, as the Hugging Face hub stores them
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """A file that a cell of a Parquet table contains."""

    container: Path
    group: int  # index of the row group
    row: int  # index of the row in the group
    column: str  # "image.bytes"
    size_bytes = 0  # unknown, because the cell would have to be read
    has_suffix = False

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes of the file as one chunk.

        Raises:
            MediaError: If the cell is empty or cannot be read.
        """
        yield read_cell(self)

    def describe(self) -> dict[str, Any]:
        """Return the path of the file that contains the cell, as cache records store it."""
        return {"in": str(self.container)}


def make_cell_finder(path: Path, name: str, finds_nulls: bool) -> FindCell | None:
    """Return a function that finds the file of a row in column `name`.

    Returns None if the column contains no files. With `finds_nulls`, the function returns None for a null
    cell.
    """
    parts = parquet_parts(path)
    column = cell_column(parts[0], name)
    if column is None:
        return None
    finders = {part: CellFinder(part, column, finds_nulls) for part in parts}
    return lambda row: finders[row.file].find(row.number)


def cell_column(path: Path, name: str) -> str | None:
    """Return the column that contains the bytes of files: `name`, or `name.bytes` if it is a struct.

    Returns None if `name` contains no files.
    """
    from pyarrow import types

    with open_parquet(path) as file:
        schema = file.schema_arrow
        if name not in schema.names:
            return None
        arrow_type = schema.field(name).type
        if types.is_struct(arrow_type):
            inner_names = [field.name for field in arrow_type]
            if "bytes" in inner_names:
                name = f"{name}.bytes"
                arrow_type = arrow_type.field(inner_names.index("bytes")).type
        has_bytes = types.is_binary(arrow_type) or types.is_large_binary(arrow_type)
        return name if has_bytes else None


class CellFinder:
    """Finds the cells of a column of files in a Parquet file, by row number."""

    def __init__(self, path: Path, column: str, finds_nulls: bool = False) -> None:
        """Read the sizes of the row groups from the file's metadata.

        Args:
            path: A file, or one of several files of a table.
            column: Column, from `cell_column`.
            finds_nulls: Whether to return None for null cells, for which their row groups have to be read.

        Raises:
            DatasetError: If a row group is too large to be read at once.
        """
        self._path = path
        self._column = column
        self._may_be_null: list[bool] = []  # whether some cells may be null, by row group
        # number of rows before each row group; the last element is the number of all rows
        self._group_starts = [0]
        leaf_columns: set[str] = set()
        with open_parquet(path) as file:
            for index in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(index)
                self._group_starts.append(self._group_starts[-1] + group.num_rows)
                chunks = [group.column(column_index) for column_index in range(group.num_columns)]
                leaf_columns |= {chunk.path_in_schema for chunk in chunks}
                cells = [chunk for chunk in chunks if chunk.path_in_schema == column]
                size_bytes = sum(chunk.total_uncompressed_size for chunk in cells)
                if size_bytes > MAX_GROUP_BYTES:
                    raise DatasetError(
                        f"{path}: a row group contains {size_bytes / 1e9:.1f} GB of {column}, at most "
                        f"{MAX_GROUP_BYTES / 1e9:.1f} GB are read at a time. Write it again with "
                        "row_group_size=100."
                    )
                self._may_be_null.append(finds_nulls and _may_have_nulls(cells))
        # in datasets of the Hugging Face hub, a cell has `bytes` or `path`; it is null only if both are
        path_column = f"{column.rpartition('.')[0]}.path"
        self._value_columns = [name for name in (column, path_column) if name in leaf_columns]
        self._are_filled: dict[int, Sequence[bool]] = {}  # results of `_read_filled`, by row group

    def find(self, number: int) -> ParquetCell | None:
        """Return the cell in this row, counted from 1; None if it is null."""
        # the last group that starts at or before the row
        group = bisect.bisect_right(self._group_starts, number - 1) - 1
        row = number - 1 - self._group_starts[group]
        if self._may_be_null[group]:
            if group not in self._are_filled:
                self._are_filled[group] = self._read_filled(group)
            if not self._are_filled[group][row]:
                return None
        return ParquetCell(self._path, group, row, self._column)

    def _read_filled(self, group: int) -> Sequence[bool]:
        """Return for each row of a Parquet row group whether its cell is not null."""
        try:
            are_valid = [
                _column(self._path, group, name).is_valid().to_pylist() for name in self._value_columns
            ]
            return [any(row) for row in zip(*are_valid, strict=True)]
        except (DatasetError, OSError, ValueError, IndexError):  # reported where cells are read
            return [True] * (self._group_starts[group + 1] - self._group_starts[group])


def _may_have_nulls(chunks: Sequence[Any]) -> bool:
    """Return whether a column may have nulls; True if the file does not record how many there are."""
    counts = []
    for chunk in chunks:
        if chunk.is_stats_set and chunk.statistics.has_null_count:
            counts.append(chunk.statistics.null_count)
    return not counts or any(counts)


def read_cell(origin: ParquetCell) -> bytes:
    """Return the bytes in a cell of a Parquet file.

    Raises:
        MediaError: If the cell is empty or cannot be read.
    """
    position = f"{origin.container}, row {origin.row + 1} of row group {origin.group + 1}"
    try:
        content = _column(origin.container, origin.group, origin.column)[origin.row].as_py()
    except OSError as error:
        raise MediaError(f"{position}: it cannot be read: {error.strerror or error}") from error
    except (DatasetError, ValueError, IndexError) as error:
        raise MediaError(f"{position}: it cannot be read: {error}") from error
    if not content:
        raise MediaError(f"{position}: its {origin.column} is empty")
    return bytes(content)


def _column(path: Path, group: int, column: str) -> Any:
    """Return a column of a row group. Raises DatasetError, OSError or ValueError if it is unreadable."""
    mtime_ns = path.stat().st_mtime_ns
    with _ONE_AT_A_TIME:
        return _read_column(path, group, column, mtime_ns)


@lru_cache(maxsize=2)  # sources are read in the order of rows
def _read_column(path: Path, group: int, column: str, mtime_ns: int) -> Any:
    """Return a column of a row group as an Arrow array."""
    # `mtime_ns` only serves as part of the cache key, so that a changed file is read again.
    with open_parquet(path, [column]) as file:
        limit = UnpackedBytesLimit.of(path)
        limit.max_bytes = min(limit.max_bytes, MAX_GROUP_BYTES)  # one row group is in memory at a time
        measure_row_group(file, limit, group, [column])  # raises DatasetError if the pages are too large
        cells = file.read_row_group(group, columns=[column], use_threads=False).column(0)
    # pyarrow returns a column of a struct as a struct with that one field
    if "." in column and hasattr(cells.type, "num_fields") and cells.type.num_fields:
        import pyarrow.compute as pc

        cells = pc.struct_field(cells, column.rpartition(".")[2])
    cells.validate(full=True)  # checks indices into dictionaries, too
    return cells
