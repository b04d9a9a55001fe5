"""The formats of list and table files (CSV, JSON Lines, Parquet), and how to read a file in any of them.

Sources (`tables_listing.py` ...) read rows through this file, which knows no source format.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from dataset.forms.contract import FindCell, RowFormat, TableRow
from dataset.forms.delimited import DELIMITED
from dataset.forms.jsonl import JSON_LINES
from dataset.forms.parquet import PARQUET
from modules.errors import DatasetError

# in the order in which messages name them, one a line
# fmt: off
ROWS: tuple[RowFormat, ...] = (
    DELIMITED,
    JSON_LINES,
    PARQUET,
)
# fmt: on
FORMAT_BY_SUFFIX: Mapping[str, RowFormat] = {suffix: rows for rows in ROWS for suffix in rows.suffixes}


def row_format(path: Path) -> RowFormat:
    """Return the format that reads a table file, judged by the file's name.

    Raises:
        DatasetError: If no format reads files with this name.
    """
    for rows in ROWS:
        if rows.reads(path):
            return rows
    *names, last = (name for rows in ROWS for name in rows.list_names())
    raise DatasetError(
        f"{path}: tables are read from {', '.join(names)} or {last}; this ends in {path.suffix or 'nothing'}"
    )


def column_names(path: Path) -> tuple[str, ...]:
    """Return a table file's column names; for JSONL, the keys of its first lines.

    Raises:
        DatasetError: If the file cannot be read or has no columns.
    """
    return row_format(path).column_names(path)


def read_columns(path: Path, names: Collection[str] | None = None) -> Iterator[TableRow]:
    """Yield the rows of a table file with the columns `names`; None means all columns.

    Names that are not columns are ignored. A row that cannot be read has a `fault` and no values; reading
    continues with the next row.

    Raises:
        DatasetError: If the file is missing, does not match its suffix, or is not UTF-8.
    """
    yield from row_format(path).read_rows(path, names)


def find_cells(path: Path, name: str, finds_nulls: bool) -> FindCell | None:
    """Return a function that finds the file of a row in column `name`.

    Returns None if the column contains no files. With `finds_nulls`, the function returns None for a null
    cell.
    """
    return row_format(path).find_cells(path, name, finds_nulls)


def plain_columns(path: Path, names: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the columns among `names` that contain small values, and those that contain files."""
    return row_format(path).plain_columns(path, names)
