"""Images and clips that stand in a column of a Parquet file, as the Hugging Face hub stores them."""

import bisect
import itertools
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from dataset.sources.columns import open_parquet
from dataset.sources.origin import ParquetCell
from dataset.sources.parquet_pages import Unpacking, largest_value
from modules.errors import DatasetError, MediaError

MOST_GROUP_BYTES = 1 << 31  # of a column in a row group, which is read as a whole
_ONE_AT_A_TIME = threading.Lock()  # else all threads that begin would read, and hold, the same row group
_SUFFIXES = ((b"GIF8", ".gif"), (b"RIFF", ".webp"))  # of files whose name counts: they may be animations


def cell_column(path: Path, name: str) -> str | None:
    """Return which column holds the bytes of `name`: itself, or `name.bytes`; None if there are none."""
    from pyarrow import types

    with open_parquet(path) as file:
        schema = file.schema_arrow
        if name not in schema.names:
            return None
        kind = schema.field(name).type
        if types.is_binary(kind) or types.is_large_binary(kind):
            return name
        if not types.is_struct(kind):
            return None
        inner = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
        held = inner.get("bytes")
        return (
            f"{name}.bytes"
            if held is not None and (types.is_binary(held) or types.is_large_binary(held))
            else None
        )


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
        starts = list(itertools.accumulate((group.num_rows for group in groups), initial=0))

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
    return next((suffix for magic, suffix in _SUFFIXES if content.startswith(magic)), "")


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
