"""Bound the unpacked size of a Parquet file: a few bytes may stand for a gigabyte of text in each row.

Sizes in the metadata may be wrong; the header of each page decides the memory. Source:
github.com/apache/parquet-format, parquet.thrift (Apache-2.0), and Thrift's compact protocol.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from modules.errors import DatasetError
from modules.varints import read_varint

LEAST_BYTES = 1 << 26  # that any file may unpack to
MOST_TIMES = 1000  # its size, that a larger one may; texts that are all alike shrink that far
ROW_BYTES, VALUE_BYTES = 256, 16  # in memory of a row, and of a value, besides what it says
# bytes of a page's header, with the statistics in it: usual ones, and at most, which is pyarrow's own limit
_HEADERS = (1 << 12, 1 << 16, 1 << 20, 1 << 24)
_DICTIONARY_PAGE, _DELTA_BYTE_ARRAY = 2, 7
# numbers of fields in a page's header: type, sizes, and the structs of the kinds of pages
_TYPE, _UNPACKED, _PACKED, _DATA, _DATA_V2 = 1, 2, 3, 5, 8
_ENCODINGS = {_DATA: 2, _DATA_V2: 4}  # field in that struct
_BINARY, _STRUCT = 8, 12  # kinds of fields
_NUMBERS = (4, 5, 6)
_SWITCHES = (1, 2)


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


def largest_value(file: Any, pages: Unpacking, group: int, columns: Collection[str]) -> int:
    """Return the size in bytes of the largest page whose values are used again: of a dictionary, or of
    prefixes. 0: there is none. Each row may hold a value as large as that page.

    file: a `ParquetFile`. pages: counter for the pages of this row group. columns: with all that is in them.
    Raises DatasetError if that is too much, ValueError if pages are damaged, OSError.
    """
    chunks, largest, wanted = file.metadata.row_group(group), 0, set(columns)
    with pages.path.open("rb") as content:
        for number in range(chunks.num_columns):
            chunk = chunks.column(number)
            if not wanted.isdisjoint(accumulate(chunk.path_in_schema.split("."), "{}.{}".format)):
                pages.add(chunk.num_values * VALUE_BYTES)
                largest = max(largest, file.schema.column(number).length, _walk(content, chunk, pages))
    return largest


def _walk(content: Any, chunk: Any, pages: Unpacking) -> int:
    """Count the pages of a column in a row group; return the size as `largest_value` does."""
    largest, values = 0, 0
    place = min(one for one in (chunk.data_page_offset, chunk.dictionary_page_offset) if one is not None)
    end = place + chunk.total_compressed_size
    while place < end and values < chunk.num_values:
        header, size = _read_header(content, place)
        unpacked, packed = _number(header, _UNPACKED), _number(header, _PACKED)
        pages.add(unpacked)
        repeats = header.get(_TYPE) == _DICTIONARY_PAGE
        kind = next((field for field in _ENCODINGS if isinstance(header.get(field), dict)), None)
        if kind is not None:
            count = _number(header[kind], 1)
            pages.add(max(0, count - chunk.num_values) * VALUE_BYTES)
            values += count
            repeats |= header[kind].get(_ENCODINGS[kind]) == _DELTA_BYTE_ARRAY
        if repeats:
            largest = max(largest, unpacked)
        place += size + packed
    return largest


def _number(fields: dict[int, Any], field: int) -> int:
    number = fields.get(field)
    if not isinstance(number, int) or number < 0:
        raise ValueError("a page without a size")
    return number


def _read_header(content: Any, place: int) -> tuple[dict[int, Any], int]:
    """Return the fields of a page's header, and its size in bytes."""
    for most in _HEADERS:
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
        elif kind not in _SWITCHES:
            raise ValueError("a page's header is damaged")
    return found, place + 1


def _signed(data: memoryview, place: int) -> tuple[int, int]:
    number, place = read_varint(data, place)
    return (number >> 1) ^ -(number & 1), place
