"""Read tables that others made, row by row: Parquet (a file or a folder of parts), CSV, TSV, JSONL.

Only the rows of one batch are in memory. Values are those of the file: texts in CSV and TSV, any values in
Parquet and JSONL.
"""

import csv
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dataset.sources import parquet
from dataset.sources.captions import not_utf8
from modules.command import as_typed
from modules.errors import DatasetError
from modules.limits import MAX_CELL_CHARACTERS, MAX_COLUMNS
from modules.text_files import parse_json, read_lines

PARQUET, CSV, TSV, JSONL = "Parquet", "CSV", "TSV", "JSONL"
FORMATS: Mapping[str, str] = {
    **dict.fromkeys(parquet.SUFFIXES, PARQUET),
    ".csv": CSV,
    **dict.fromkeys((".tsv", ".tab"), TSV),
    **dict.fromkeys((".jsonl", ".ndjson"), JSONL),
}
BATCH_ROWS, BATCH_BYTES = 4096, 1 << 26  # of Parquet, in memory at a time
FIRST_LINES = 100  # of JSONL, whose keys are taken for the columns


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table."""

    file: Path  # if there are several parts, the part with this row
    unit: str  # what `number` counts: "line", or "row" in Parquet
    number: int  # from 1; of a CSV row over several lines, the first; in CSV the first line is the header
    # by column: values that are not null
    values: Mapping[str, Any] = field(default_factory=dict)
    fault: str | None = None  # why it has no values: "it has 3 cells, the header has 2"

    @property
    def where(self) -> str:
        """Return `data.csv, line 3` for messages."""
        return f"{self.file}, {self.unit} {self.number}"


def table_format(path: Path) -> str:
    """Return the format of a table by its suffix; of a folder PARQUET. Raises DatasetError for another."""
    if path.is_dir():
        return PARQUET
    name = FORMATS.get(path.suffix.lower())
    if name is None:
        raise DatasetError(
            f"{path}: tables are read from {', '.join(FORMATS)}, or a folder of .parquet parts; this ends in "
            f"{path.suffix or 'nothing'}"
        )
    return name


def column_names(path: Path) -> tuple[str, ...]:
    """Return the names of a table's columns; of JSONL the keys of its first lines.

    Raises DatasetError if the file cannot be read or has no columns.
    """
    kind = table_format(path)
    if kind == PARQUET:
        return _parquet_columns(parquet.parquet_parts(path)[0], None).names
    if kind == JSONL:
        keys: dict[str, None] = {}
        for row in itertools.islice(read_jsonl(path, None), FIRST_LINES):
            keys |= dict.fromkeys(row.values)
        return tuple(keys)
    names, _ = _open_csv(path, kind)
    return tuple(names)


def read_columns(path: Path, names: Collection[str] | None = None) -> Iterator[TableRow]:
    """Yield the rows of a table with the columns `names`; None: all of them. A name that is not a column is
    left out.

    A row that cannot be read has a `fault` and no values; the next ones follow. Raises DatasetError if the
    file is missing, does not fit its suffix, or is not UTF-8.
    """
    kind = table_format(path)
    if kind == PARQUET:
        for part in parquet.parquet_parts(path):
            yield from _parquet_rows(part, names)
    elif kind == JSONL:
        yield from read_jsonl(path, names)
    else:
        yield from _csv_rows(path, kind, names)


# --- texts
# ------------------------------------------------------------------------------------------------------------


def table_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file without their ends. Raises DatasetError as `read_columns`."""
    number = 0
    try:
        for number, line in enumerate(read_lines(path), 1):  # noqa: B007
            yield line
    except UnicodeDecodeError:
        raise not_utf8(path, number) from None
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}. Correct the path.") from error


def read_jsonl(path: Path, names: Collection[str] | None, example: str = "") -> Iterator[TableRow]:
    """Yield the rows of a JSONL file, whatever its suffix is; empty lines are skipped.

    example: of a line, which faults then show. Raises DatasetError as `read_columns`, and for a file of
    another form: an array, an object over several lines, or CSV.
    """
    hint = f". Each line is one object such as {example}" if example else ""
    is_first = True
    for number, line in enumerate(table_lines(path), 1):
        if not line.strip():
            continue
        fault = None
        record = None
        try:
            record = parse_json(line, no_repeats=True)
        except ValueError as error:
            fault = f"invalid JSON: {error}{hint}"
            if line.rstrip().endswith("},"):
                fault = f"there is a comma after the object. Remove it{hint}"
        if is_first and not isinstance(record, dict):
            _refuse_other_form(path, line)
        is_first = False
        if fault is None and not isinstance(record, dict):
            fault = f"it is not an object of columns and values{hint}"
        cells: Mapping[str, Any] = {} if fault is not None else record or {}
        keys = cells if names is None else names
        values = {key: cells[key] for key in keys if cells.get(key) is not None}
        yield TableRow(path, "line", number, values, fault=fault)


TO_LINES = (
    "import json, sys; [print(json.dumps(row)) for row in json.load(open(sys.argv[1], encoding='utf-8'))]"
)


def _refuse_other_form(path: Path, line: str) -> None:
    """Raise DatasetError if the first line of a list shows that the file is none of lines of JSON.

    line: not empty, and no object.
    """
    start = line.strip()
    form = "a list has one object on each line, with nothing around or between them (JSONL)"
    is_array = start.startswith("[") and start[1:].strip()[:1] in {"", "{"}
    if is_array:
        lines = as_typed([str(path.with_name(f"{path.stem}_lines.jsonl"))])
        remedy = f"{as_typed(['python', '-c', TO_LINES, str(path)])} > {lines}"
        raise DatasetError(f"{path} is one JSON array; {form}.\n  Convert it: {remedy}")
    continues = start.endswith(("{", "[", ":", ",")) and not start.endswith("},")
    if start.startswith("{") and continues:
        raise DatasetError(
            f"{path} has an object over several lines; {form}. Write each object on one line, as json.dumps "
            "without indent does."
        )
    has_separator = any(mark in start for mark in ",\t;")
    if has_separator and not start.startswith(("{", "[")):
        raise DatasetError(
            f"{path} looks like a table with a header ({start[:60]!r}); {form}. Name it .csv or .tsv, and "
            "give it to image_table_file or video_table_file."
        )


def _open_csv(path: Path, kind: str) -> tuple[list[str], Any]:
    """Return the columns of a CSV or TSV file, and a reader of the rows after the first line."""
    lines = table_lines(path)
    num_empty = 0
    header = ""  # the line that names the columns
    for header in lines:
        if header.strip():
            break
        num_empty += 1
    if not header.strip():
        raise DatasetError(f"{path} is empty; its first line names the columns")
    mark = _mark_between(header, kind)
    separator_line = re.fullmatch(r"sep=(.) *", header) if kind == CSV else None
    if separator_line is not None:  # as spreadsheets write it: the next line names the columns
        mark = separator_line[1]
        header = ""
    head = [*[""] * num_empty, header]
    lines_with_ends = (f"{line}\n" for line in itertools.chain(head, lines))
    rows = csv.reader(lines_with_ends, delimiter=mark, strict=True)
    try:
        first_row = next(row for row in rows if row)
        names = [name.strip() for name in first_row]
    except StopIteration:
        raise DatasetError(f"{path} ends before the names of its columns") from None
    except csv.Error as error:
        raise DatasetError(
            f"{path}, line {len(head)}: the names of the columns cannot be read: {error}"
        ) from None
    _check_names(path, names)
    return names, rows


def _mark_between(first: str, kind: str) -> str:
    """Return the separator of a table's cells, from the line that names its columns."""
    if kind == TSV or ("," not in first and ";" not in first and "\t" in first):
        return "\t"
    # spreadsheets write semicolons where the comma stands in numbers
    return ";" if "," not in first and ";" in first else ","


def _csv_rows(path: Path, kind: str, names: Collection[str] | None) -> Iterator[TableRow]:
    header, rows = _open_csv(path, kind)
    places = [(name, place) for place, name in enumerate(header) if names is None or name in names]
    while True:
        number = rows.line_num + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "limit" in str(error):
                raise DatasetError(
                    f"{path}, line {number}: a cell has more than {MAX_CELL_CHARACTERS:,} characters. A "
                    "quote that is not closed looks like that; correct it, or use JSONL or Parquet."
                ) from None
            yield TableRow(path, "line", number, fault=f"it is not valid {kind}: {error}")
            continue
        if len(cells) == len(header):
            yield TableRow(path, "line", number, {name: cells[place] for name, place in places})
        elif cells:  # else an empty line
            fault = f"it has {len(cells)} cells, the header has {len(header)}"
            yield TableRow(path, "line", number, fault=fault)


def _check_names(path: Path, names: Sequence[str]) -> None:
    if len(names) > MAX_COLUMNS:
        raise DatasetError(f"{path} has {len(names):,} columns, at most {MAX_COLUMNS:,} are read")
    twice = next((name for name, count in Counter(names).items() if count > 1 and name), None)
    if twice is not None:
        raise DatasetError(f"{path}: the column {twice!r} is there twice; rename one of them")


# --- Parquet
# ------------------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path, names: Collection[str] | None) -> Iterator[TableRow]:
    columns = _parquet_columns(path, names)
    if columns.nested:  # their size is unknown
        name, kind = next(iter(columns.nested.items()))
        raise DatasetError(
            f"{path}: the column {name!r} holds {kind}, which is neither a text nor a list of them"
        )
    with parquet.open_parquet(path, columns.leaves_of_lists) as file:
        limit = parquet.Unpacking.of(path)
        if not columns.names:
            limit.add(parquet.ROW_BYTES * file.metadata.num_rows)
            for number in range(1, file.metadata.num_rows + 1):
                yield TableRow(path, "row", number)
            return
        number = 0
        for cells in _parquet_batches(file, path, columns.names, limit):
            for row in zip(*cells, strict=True):
                number += 1
                pairs = zip(columns.names, row, strict=True)
                values = {name: value for name, value in pairs if value is not None}
                yield TableRow(path, "row", number, values)


def _parquet_batches(
    file: Any, path: Path, names: Sequence[str], limit: parquet.Unpacking
) -> Iterator[list[list[Any]]]:
    """Yield the values of rows by column, some rows at a time. limit: counts the memory that they take."""
    for group in range(file.metadata.num_row_groups):
        largest = parquet.largest_value(file, parquet.Unpacking.of(path), group, names)
        num_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, largest)))
        for batch in file.iter_batches(num_rows, [group], names, use_threads=False):
            limit.add(parquet.ROW_BYTES * len(batch))
            yield [_values(batch.column(name), limit) for name in names]


class _ParquetColumns(NamedTuple):
    """Columns of a Parquet file."""

    names: tuple[str, ...]
    nested: dict[str, Any]  # types of those with nested values
    leaves_of_lists: list[str]  # for `open_parquet`, which then holds equal texts once


def _parquet_columns(path: Path, names: Collection[str] | None) -> _ParquetColumns:
    """Return the columns of these names; None: all of them."""
    with parquet.open_parquet(path) as file:
        schema = file.schema_arrow
        leaves = [file.schema.column(number).path for number in range(len(file.schema))]
    from pyarrow import types

    _check_names(path, schema.names)
    columns = tuple(name for name in schema.names if names is None or name in names)
    nested: dict[str, Any] = {}
    leaves_of_lists: list[str] = []
    for name in columns:
        kind = schema.field(name).type
        if types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
            leaves_of_lists += [leaf for leaf in leaves if leaf.startswith(f"{name}.")]
        if types.is_nested(kind):
            nested[name] = kind
    return _ParquetColumns(columns, nested, leaves_of_lists)


def plain_columns(path: Path, names: Collection[str]) -> tuple[list[str], list[str]]:
    """Return those columns whose values can be read cheaply, and those that hold whole files."""
    if table_format(path) != PARQUET:
        return [*names], []
    part = parquet.parquet_parts(path)[0]
    cells = [name for name in names if parquet.cell_column(part, name) is not None]
    nested = _parquet_columns(part, names).nested
    return [name for name in names if name not in nested and name not in cells], cells


def _values(array: Any, limit: parquet.Unpacking) -> list[Any]:
    from pyarrow import compute, types

    if types.is_list(array.type) or types.is_large_list(array.type):
        array.validate(full=True)  # else indices into dictionaries are not checked
        inner = array.flatten()
        limit.add(parquet.VALUE_BYTES * len(inner))
        if types.is_dictionary(inner.type):
            sizes = compute.binary_length(inner.dictionary)
            limit.add(compute.sum(compute.take(sizes, inner.indices)).as_py() or 0)
        return list(array.to_pylist())
    values: list[Any] = array.to_pylist()
    limit.add(sum(len(value) for value in values if isinstance(value, (str, bytes))))
    return values
