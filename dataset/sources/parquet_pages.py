"""Bound what a Parquet file unpacks to: a few bytes may say that a text of a gigabyte stands in each row.

What the metadata say of sizes need not be so; memory is taken by what the header of each page says.
Source: github.com/apache/parquet-format, parquet.thrift (Apache-2.0), and Thrift's compact protocol.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.errors import DatasetError
from modules.varints import read_varint

LEAST_BYTES = 1 << 26  # that any file may unpack to
MOST_TIMES = 1000  # its size, that a larger one may; texts that are all alike shrink that far
ROW_BYTES, VALUE_BYTES = 256, 16  # in memory of a row, and of a value, besides what it says
LONGEST_HEADER = 1 << 24  # bytes of a page's header, with the statistics in it; pyarrow's own limit
_USUAL_HEADER = 1 << 12
_DICTIONARY_PAGE, _DELTA_BYTE_ARRAY = 2, 7
# numbers of fields in a page's header: type, sizes, and the structs of the kinds of pages
_TYPE, _UNPACKED, _PACKED, _DATA, _DATA_V2 = 1, 2, 3, 5, 8
_ENCODINGS = {_DATA: 2, _DATA_V2: 4}  # field in that struct
_BINARY, _STRUCT = 8, 12  # kinds of fields
_NUMBERS = (4, 5, 6)
_SIZES = {1: 0, 2: 0, 3: 1, 7: 8}  # bytes of fields of a fixed size


@dataclass
class Unpacking:
    """Counts what is unpacked of a file."""

    path: Path
    most_bytes: int
    found_bytes: int = 0

    @staticmethod
    def of(path: Path) -> "Unpacking":
        """Begin for a file. Raises OSError if it is gone."""
        return Unpacking(path, LEAST_BYTES + MOST_TIMES * path.stat().st_size)

    def add(self, size_bytes: int) -> None:
        """Count what is about to be unpacked. Raises DatasetError if that is far too much for the file."""
        self.found_bytes += size_bytes
        if self.found_bytes > self.most_bytes:
            raise DatasetError(
                f"{self.path}: a file of {self.path.stat().st_size:,} bytes that unpacks to more than "
                f"{self.most_bytes >> 20:,} MiB is damaged, or made to fill the memory. Write it again from "
                "its source."
            )


def largest_value(file: Any, limit: Unpacking, group: int, columns: Collection[str]) -> int:
    """Return how many bytes a value that pages repeat may have; 0 if they repeat none.

    file: a `ParquetFile`. columns: of the row group, with all that is in them. Raises DatasetError if its
    pages hold more than `limit`, ValueError if they are damaged, OSError.
    """
    chunks, largest = file.metadata.row_group(group), 0
    pages = Unpacking(limit.path, limit.most_bytes)  # for each group: they are read one after the other
    with limit.path.open("rb") as content:
        for number in range(chunks.num_columns):
            chunk = chunks.column(number)
            if any(
                chunk.path_in_schema == one or chunk.path_in_schema.startswith(f"{one}.") for one in columns
            ):
                pages.add(chunk.num_values * VALUE_BYTES)
                largest = max(largest, file.schema.column(number).length, _walk(content, chunk, pages))
    return largest


def _walk(content: Any, chunk: Any, pages: Unpacking) -> int:
    """Count the pages of a column in a row group; return the size of the largest that repeats values."""
    largest, values = 0, 0
    place = min(one for one in (chunk.data_page_offset, chunk.dictionary_page_offset) if one is not None)
    end = place + chunk.total_compressed_size
    while place < end and values < chunk.num_values:
        header, size = _read_header(content, place)
        unpacked, packed = (header.get(field) for field in (_UNPACKED, _PACKED))
        if not (isinstance(unpacked, int) and isinstance(packed, int) and unpacked >= 0 and packed >= 0):
            raise ValueError("a page without a size")
        pages.add(unpacked)
        kind, of_data = next(
            ((field, one) for field in _ENCODINGS if isinstance(one := header.get(field), dict)), (0, {})
        )
        count = of_data.get(1, 0)
        pages.add(max(0, count - chunk.num_values) * VALUE_BYTES)
        values += count
        repeats = header.get(_TYPE) == _DICTIONARY_PAGE
        if repeats or (kind and of_data.get(_ENCODINGS[kind]) == _DELTA_BYTE_ARRAY):
            largest = max(largest, unpacked)
        place += size + packed
    return largest


def _read_header(content: Any, place: int) -> tuple[dict[int, Any], int]:
    """Return the fields of a page's header, and its size in bytes."""
    for most in (_USUAL_HEADER, LONGEST_HEADER):
        content.seek(place)
        data = content.read(most)
        try:
            return _read_struct(memoryview(data), 0)
        except IndexError:
            if len(data) < most:
                break
    raise ValueError("a page is cut short")


def _read_struct(data: memoryview, place: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Return the numbers and structs in a struct by the numbers of their fields, and where it ends."""
    if depth > 4:  # a page's header, its kind, its statistics
        raise ValueError("a page's header is damaged")
    found: dict[int, Any] = {}
    field = 0
    while data[place]:
        step, kind = data[place] >> 4, data[place] & 15
        place += 1
        if step:
            field += step
        else:
            field, place = _signed(data, place)
        if kind == _STRUCT:
            found[field], place = _read_struct(data, place, depth + 1)
        elif kind in _NUMBERS:
            found[field], place = _signed(data, place)
        elif kind == _BINARY:
            size, place = read_varint(data, place)
            place += size
        elif kind in _SIZES:
            place += _SIZES[kind]
        else:
            raise ValueError("a page's header is damaged")
    return found, place + 1


def _signed(data: memoryview, place: int) -> tuple[int, int]:
    number, place = read_varint(data, place)
    return (number >> 1) ^ -(number & 1), place
