"""Parquet files that others made: opened, bounded in what they unpack to, and files in their columns.

A few bytes may stand for a gigabyte of text in each row. Sizes in the metadata may be wrong; the header of
each page decides the memory. Source: github.com/apache/parquet-format, parquet.thrift (Apache-2.0), and
Thrift's compact protocol.
"""

import bisect
import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from dataset.forms.composing import FORMAT_OF_SUFFIX, row_format
from dataset.forms.contract import FindCell
from modules.errors import DatasetError, MediaError
from modules.limits import MAX_GROUP_BYTES, MAX_UNPACKED_TIMES, MIN_UNPACKED_BYTES
from modules.text_files import require_regular_file
from modules.varints import read_varint

ROW_BYTES, VALUE_BYTES = 256, 16  # memory of a row, and of a value, besides its content
# bytes of a page's header, with the statistics in it: usual ones, and at most, which is pyarrow's own limit
_HEADERS = (1 << 12, 1 << 16, 1 << 20, 1 << 24)
_DICTIONARY_PAGE, _DELTA_BYTE_ARRAY = 2, 7
# numbers of fields in a page's header: type, sizes, and the structs of the kinds of pages
_TYPE, _UNPACKED, _PACKED, _DATA, _DATA_V2 = 1, 2, 3, 5, 8
_ENCODINGS = {_DATA: 2, _DATA_V2: 4}  # field in that struct
_BINARY, _STRUCT = 8, 12  # kinds of fields
_NUMBERS = (4, 5, 6)
_SWITCHES = (1, 2)
_ONE_AT_A_TIME = threading.Lock()  # else all threads that begin would read, and hold, the same row group


def parquet_parts(path: Path) -> list[Path]:
    """Return the file itself, or the parts in a folder, by name.

    Raises:
        DatasetError: If it has none.
    """
    if not path.is_dir():
        return [path]
    parts = sorted(
        part
        for part in path.iterdir()
        if FORMAT_OF_SUFFIX.get(part.suffix.lower()) is row_format(path)
        and not part.name.startswith((".", "_"))
    )
    if not parts:
        raise DatasetError(
            f"{path} is a folder without .parquet files. Name a .parquet, .csv, .tsv or .jsonl file, or a "
            "folder of .parquet parts."
        )
    return parts


@contextlib.contextmanager
def open_parquet(path: Path, repeating: Sequence[str] = ()) -> Iterator[Any]:
    """Open a Parquet file (a pyarrow `ParquetFile`).

    `repeating` are columns whose equal texts are stored only once in memory.

    Raises:
        DatasetError: If the file cannot be opened, or if reading it in the block fails.
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
    max_bytes: int
    found_bytes: int = 0

    @staticmethod
    def of(path: Path) -> "Unpacking":
        """Begin for a file.

        Raises:
            OSError: If it is gone.
        """
        return Unpacking(path, MIN_UNPACKED_BYTES + MAX_UNPACKED_TIMES * path.stat().st_size)

    def add(self, size_bytes: int) -> None:
        """Count bytes about to be unpacked.

        Raises:
            DatasetError: If they are far too many for the file.
        """
        self.found_bytes += size_bytes
        if self.found_bytes > self.max_bytes:
            raise DatasetError(
                f"{self.path}: a file of {self.path.stat().st_size:,} bytes that unpacks to more than "
                f"{self.max_bytes >> 20:,} MiB is damaged, or made to fill the memory. Write it again from "
                "its source."
            )


def largest_value(file: Any, pages: Unpacking, group: int, columns: Collection[str]) -> int:
    """Return the size of the largest page whose values rows can refer to, in bytes.

    Such pages hold dictionaries or prefixes. A damaged or malicious file could make each row as large as the
    page.

    Args:
        file: A `ParquetFile`.
        pages: Counter for the pages of this row group.
        group: Index of the row group.
        columns: Names of columns, with all nested ones.

    Returns:
        The size, or 0 if there is no such page.

    Raises:
        DatasetError: If the decompressed pages would be too large.
        ValueError: If the pages are damaged.
        OSError: If the file cannot be read.
    """
    chunks = file.metadata.row_group(group)
    largest = 0
    names = set(columns)
    with pages.path.open("rb") as content:
        for number in range(chunks.num_columns):
            chunk = chunks.column(number)
            # a column of a struct, `image.bytes`, counts if one of its parents, `image`, is asked for
            parents = accumulate(chunk.path_in_schema.split("."), "{}.{}".format)
            if not names.isdisjoint(parents):
                pages.add(chunk.num_values * VALUE_BYTES)
                largest = max(largest, file.schema.column(number).length)
                largest = max(largest, _count_pages(content, chunk, pages))
    return largest


def _count_pages(content: Any, chunk: Any, pages: Unpacking) -> int:
    """Count the unpacked bytes of a column in a row group; return its `largest_value`.

    The page headers are read, because the footer's sizes may be wrong. A column chunk is a row of pages: one
    dictionary, if any, then data pages, each with a header in front.
    """
    largest = 0
    num_values = 0
    offset = chunk.data_page_offset
    if chunk.dictionary_page_offset is not None:
        offset = min(offset, chunk.dictionary_page_offset)
    end = offset + chunk.total_compressed_size
    while offset < end and num_values < chunk.num_values:
        header, header_size = _read_header(content, offset)
        unpacked_size = _number(header, _UNPACKED)
        packed_size = _number(header, _PACKED)
        pages.add(unpacked_size)
        # values that rows refer to: a dictionary, or below a page of texts that repeat starts of earlier ones
        is_referred_to = header.get(_TYPE) == _DICTIONARY_PAGE
        data_page = next((field for field in _ENCODINGS if isinstance(header.get(field), dict)), None)
        if data_page is not None:
            count = _number(header[data_page], 1)
            pages.add(max(0, count - chunk.num_values) * VALUE_BYTES)  # the rest is counted already
            num_values += count
            is_referred_to |= header[data_page].get(_ENCODINGS[data_page]) == _DELTA_BYTE_ARRAY
        if is_referred_to:
            largest = max(largest, unpacked_size)
        offset += header_size + packed_size
    return largest


def _number(fields: dict[int, Any], field: int) -> int:
    number = fields.get(field)
    if not isinstance(number, int) or number < 0:
        raise ValueError("a page without a size")
    return number


def _read_header(content: Any, place: int) -> tuple[dict[int, Any], int]:
    """Return the fields of a page's header, and its size in bytes."""
    for maximum in _HEADERS:
        content.seek(place)
        data = content.read(maximum)
        try:
            return _read_struct(memoryview(data), 0)
        except IndexError:
            if len(data) < maximum:
                break
    raise ValueError("a page is cut short")


def _read_struct(data: memoryview, place: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Parse a struct of Thrift's compact protocol: return numbers and structs by field id, and the end."""
    if depth > 4:  # a page's header, its kind, its statistics
        raise ValueError("a page's header is damaged")
    values: dict[int, Any] = {}
    field = 0
    while data[place]:
        step = data[place] >> 4
        kind = data[place] & 15
        place += 1
        if step:
            field += step
        else:
            field, place = _signed(data, place)
        if kind == _STRUCT:
            values[field], place = _read_struct(data, place, depth + 1)
        elif kind in _NUMBERS:
            values[field], place = _signed(data, place)
        elif kind == _BINARY:
            size, place = read_varint(data, place)
            place += size
        elif kind not in _SWITCHES:
            raise ValueError("a page's header is damaged")
    return values, place + 1


def _signed(data: memoryview, place: int) -> tuple[int, int]:
    number, place = read_varint(data, place)
    return (number >> 1) ^ -(number & 1), place


# --- images and clips in a column, as the Hugging Face hub stores them
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """A file in a row of a Parquet file."""

    container: Path
    group: int  # of rows; both from 0
    row: int  # in the group
    column: str  # "image.bytes"
    size_bytes = 0  # not known without reading it
    has_suffix = False

    def pieces(self) -> Iterator[bytes]:
        """Yield its bytes at once.

        Raises:
            MediaError: If it is empty or cannot be read.
        """
        yield read_cell(self)

    def describe(self) -> dict[str, Any]:
        """Return the file that the cell is in, as a cache records it."""
        return {"in": str(self.container)}


def cells_of_parts(path: Path, name: str, finds_nulls: bool) -> FindCell | None:
    """Return a function that maps a row's number to its file in column `name`; None if it holds no files.

    With `finds_nulls`, the function returns None for a cell that is null.
    """
    parts = parquet_parts(path)
    column = cell_column(parts[0], name)
    if column is None:
        return None
    places = {part: cells_of(part, column, finds_nulls) for part in parts}
    return lambda row: places[row.file](row.number)


def cell_column(path: Path, name: str) -> str | None:
    """Return the column with the bytes of `name`: itself, or `name.bytes`; None if it holds no bytes."""
    from pyarrow import types

    with open_parquet(path) as file:
        schema = file.schema_arrow
        if name not in schema.names:
            return None
        kind = schema.field(name).type
        if types.is_struct(kind):
            inner_names = [field.name for field in kind]
            if "bytes" in inner_names:
                name = f"{name}.bytes"
                kind = kind.field(inner_names.index("bytes")).type
        return name if types.is_binary(kind) or types.is_large_binary(kind) else None


def cells_of(path: Path, column: str, finds_nulls: bool = False) -> Callable[[int], ParquetCell | None]:
    """Return a function that maps a row's number, from 1, to its cell in a Parquet file.

    Args:
        path: A file, or one part of several.
        column: Column, from `cell_column`.
        finds_nulls: Whether to return None for a null cell; row groups with null cells have to be read.

    Raises:
        DatasetError: If row groups are too large to be read one at a time.
    """
    may_be_null: list[bool] = []  # by row group: whether some cells may be null
    starts = [0]  # rows before each row group, and before the end
    leaves: set[str] = set()
    with open_parquet(path) as file:
        for index in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(index)
            starts.append(starts[-1] + group.num_rows)
            chunks = [group.column(place) for place in range(group.num_columns)]
            leaves |= {chunk.path_in_schema for chunk in chunks}
            cells = [chunk for chunk in chunks if chunk.path_in_schema == column]
            size_bytes = sum(chunk.total_uncompressed_size for chunk in cells)
            _check_group_size(path, column, size_bytes)
            may_be_null.append(finds_nulls and _may_have_nulls(cells))
    # a cell of a data set of files has `bytes` or `path`; it is null only if both are
    path_column = f"{column.rpartition('.')[0]}.path"
    columns = [name for name in (column, path_column) if name in leaves]

    @cache
    def is_filled(group: int) -> Sequence[bool]:
        """Return for each row of a group whether its cell is not null."""
        try:
            are_valid = [_column(path, group, name).is_valid().to_pylist() for name in columns]
            return [any(row) for row in zip(*are_valid, strict=True)]
        except (DatasetError, OSError, ValueError, IndexError):  # reported where cells are read
            return [True] * (starts[group + 1] - starts[group])

    def find_cell(number: int) -> ParquetCell | None:
        group = bisect.bisect_right(starts, number - 1) - 1  # the last one that starts at or before the row
        row = number - 1 - starts[group]
        has_value = not may_be_null[group] or is_filled(group)[row]
        return ParquetCell(path, group, row, column) if has_value else None

    return find_cell


def _check_group_size(path: Path, column: str, size_bytes: int) -> None:
    """Raise DatasetError if the cells of a row group are too large to be read at a time."""
    if size_bytes > MAX_GROUP_BYTES:
        raise DatasetError(
            f"{path}: a row group holds {size_bytes / 1e9:.1f} GB of {column}, at most "
            f"{MAX_GROUP_BYTES / 1e9:.1f} GB are read at a time. Write it again with "
            "row_group_size=100."
        )


def _may_have_nulls(chunks: Sequence[Any]) -> bool:
    """Return whether chunks of a column have nulls, or do not say how many."""
    counts = []
    for chunk in chunks:
        if chunk.is_stats_set and chunk.statistics.has_null_count:
            counts.append(chunk.statistics.null_count)
    return not counts or any(counts)


def read_cell(origin: ParquetCell) -> bytes:
    """Return the bytes of a cell.

    Raises:
        MediaError: If it is empty or cannot be read.
    """
    where = f"{origin.container}, row {origin.row + 1} of row group {origin.group + 1}"
    try:
        content = _column(origin.container, origin.group, origin.column)[origin.row].as_py()
    except OSError as error:
        raise MediaError(f"{where}: it cannot be read: {error.strerror or error}") from error
    except (DatasetError, ValueError, IndexError) as error:
        raise MediaError(f"{where}: it cannot be read: {error}") from error
    if not content:
        raise MediaError(f"{where}: {origin.column} is empty there")
    return bytes(content)


def _column(path: Path, group: int, column: str) -> Any:
    """Return a column of a row group. Raises DatasetError, OSError or ValueError if it cannot be read."""
    stamp = path.stat().st_mtime_ns
    with _ONE_AT_A_TIME:
        return _group(path, group, column, stamp)


@lru_cache(maxsize=2)  # sources are read in the order of rows
def _group(path: Path, group: int, column: str, mtime_ns: int) -> Any:
    """Return a column of a row group.

    `mtime_ns` only serves as part of the cache key, so that a changed file is read again.
    """
    with open_parquet(path, [column]) as file:
        pages = Unpacking.of(path)
        pages.max_bytes = min(pages.max_bytes, MAX_GROUP_BYTES)
        largest_value(file, pages, group, [column])
        cells = file.read_row_group(group, columns=[column], use_threads=False).column(0)
    if "." in column and hasattr(cells.type, "num_fields") and cells.type.num_fields:
        import pyarrow.compute as pc

        cells = pc.struct_field(cells, column.rpartition(".")[2])
    cells.validate(full=True)  # else indices into dictionaries are not checked
    return cells
