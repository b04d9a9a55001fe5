"""Read Parquet row by row. Only the rows of one batch are in memory; values may have any type."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dataset.forms import parquet_files
from dataset.forms.columns import check_names
from dataset.forms.contract import TableRow
from dataset.forms.parquet_parts import parquet_parts
from modules.errors import DatasetError

BATCH_ROWS, BATCH_BYTES = 4096, 1 << 26  # maximum number of rows, and of bytes, in memory at a time


def read_column_names(path: Path) -> tuple[str, ...]:
    """Return the column names of a Parquet file, or of the first one in a folder.

    Raises:
        DatasetError: If the file cannot be read.
    """
    return _find_columns(parquet_parts(path)[0], None).names


def read_parts(path: Path, names: Collection[str] | None) -> Iterator[TableRow]:
    """Yield the rows of a Parquet file, or of all Parquet files in a folder.

    Raises:
        DatasetError: If a file cannot be read.
    """
    for part in parquet_parts(path):
        yield from _read_rows(part, names)


def split_columns(path: Path, names: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the columns among `names` that contain small values, and those that contain files."""
    part = parquet_parts(path)[0]
    cells = [name for name in names if parquet_files.cell_column(part, name) is not None]
    nested_types = _find_columns(part, names).nested_types
    plain = [name for name in names if name not in nested_types and name not in cells]
    return plain, cells


def _read_rows(path: Path, names: Collection[str] | None) -> Iterator[TableRow]:
    """Yield the rows of a Parquet file with the columns `names`; None means all columns."""
    columns = _find_columns(path, names)
    if columns.nested_types:  # rejected, because the unpacked size of their values is unknown
        name, arrow_type = next(iter(columns.nested_types.items()))
        raise DatasetError(
            f"{path}: the column {name!r} contains {arrow_type}, which is neither text nor a list of strings"
        )
    with parquet_files.open_parquet(path, columns.list_items) as file:
        limit = parquet_files.UnpackedBytesLimit.of(path)  # counts unpacked bytes, and raises if too many
        if not columns.names:  # rows without values still have numbers
            limit.add(parquet_files.ROW_BYTES * file.metadata.num_rows)
            for number in range(1, file.metadata.num_rows + 1):
                yield TableRow(path, "row", number)
            return
        number = 0
        for column_values in _read_batches(file, path, columns.names, limit):
            for row in zip(*column_values, strict=True):
                number += 1
                name_value_pairs = zip(columns.names, row, strict=True)
                values = {name: value for name, value in name_value_pairs if value is not None}
                yield TableRow(path, "row", number, values)


def _read_batches(
    file: Any, path: Path, names: Sequence[str], limit: parquet_files.UnpackedBytesLimit
) -> Iterator[list[list[Any]]]:
    """Yield the values of several rows at a time, as one list for each column."""
    # `limit` counts the memory that the values take.
    for group in range(file.metadata.num_row_groups):
        group_limit = parquet_files.UnpackedBytesLimit.of(path)
        largest = parquet_files.measure_row_group(file, group_limit, group, names)
        num_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, largest)))
        for batch in file.iter_batches(num_rows, [group], names, use_threads=False):
            limit.add(parquet_files.ROW_BYTES * len(batch))
            yield [_values(batch.column(name), limit) for name in names]


class _ParquetColumns(NamedTuple):
    """The columns to read from a Parquet file, and the types of nested ones."""

    names: tuple[str, ...]
    nested_types: dict[str, Any]  # Arrow types of columns with nested values, by name
    list_items: list[str]  # `dictionary_columns` of `open_parquet`: equal strings in lists are stored once


def _find_columns(path: Path, names: Collection[str] | None) -> _ParquetColumns:
    """Return the columns `names` of a file (None: all columns), and what their values are."""
    # A column is a single value, a list of values, or nested: a struct, or a list of lists or structs.
    with parquet_files.open_parquet(path) as file:
        schema = file.schema_arrow
        leaf_paths = [file.schema.column(index).path for index in range(len(file.schema))]
    from pyarrow import types

    check_names(path, schema.names)
    columns = tuple(name for name in schema.names if names is None or name in names)
    nested_types: dict[str, Any] = {}
    list_items: list[str] = []
    for name in columns:
        value_type = schema.field(name).type
        if types.is_list(value_type) or types.is_large_list(value_type):
            value_type = value_type.value_type  # of the items; nested if these are lists or structs
            # Parquet stores the items of the list as a leaf, such as `captions.list.element`
            list_items += [leaf for leaf in leaf_paths if leaf.startswith(f"{name}.")]
        if types.is_nested(value_type):
            nested_types[name] = value_type
    return _ParquetColumns(columns, nested_types, list_items)


def _values(array: Any, limit: parquet_files.UnpackedBytesLimit) -> list[Any]:
    """Return the values of a column as Python objects; `limit` counts the memory that these take."""
    from pyarrow import compute, types

    if types.is_list(array.type) or types.is_large_list(array.type):
        array.validate(full=True)  # checks indices into dictionaries, too
        items = array.flatten()
        limit.add(parquet_files.VALUE_BYTES * len(items))
        if types.is_dictionary(items.type):  # each index becomes a copy of a string
            sizes = compute.binary_length(items.dictionary)
            limit.add(compute.sum(compute.take(sizes, items.indices)).as_py() or 0)
        return list(array.to_pylist())
    values: list[Any] = array.to_pylist()
    limit.add(sum(len(value) for value in values if isinstance(value, (str, bytes))))
    return values
