"""Read CSV and TSV row by row; all values are strings."""

import csv
import itertools
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from dataset.forms.columns import check_names, table_lines
from dataset.forms.contract import TableRow
from modules.errors import DatasetError
from modules.limits import MAX_CELL_CHARACTERS

CSV, TSV = "CSV", "TSV"


def _get_format_name(path: Path) -> str:
    """Return whether a file contains comma-separated (CSV) or tab-separated (TSV) values."""
    return CSV if path.suffix.lower() == ".csv" else TSV


def read_column_names(path: Path) -> tuple[str, ...]:
    """Return the column names from the header line.

    Raises:
        DatasetError: If the file has no header.
    """
    names, _ = _open_after_header(path)
    return tuple(names)


def read_delimited(path: Path, names: Collection[str] | None) -> Iterator[TableRow]:
    """Yield the rows with the columns `names` (None: all); rows that cannot be read have a fault.

    Raises:
        DatasetError: If the file cannot be read.
    """
    header, rows = _open_after_header(path)
    columns = [(name, index) for index, name in enumerate(header) if names is None or name in names]
    while True:  # not a `for` loop, which an error in one row would end
        number = rows.line_num + 1  # the row's first line; after `next`, `line_num` is its last one
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "limit" in str(error):
                raise DatasetError(
                    f"{path}, line {number}: a cell has more than {MAX_CELL_CHARACTERS:,} characters. The "
                    "cause may be an unclosed quote; correct it, or use JSONL or Parquet."
                ) from None
            yield TableRow(path, "line", number, fault=f"it is not valid {_get_format_name(path)}: {error}")
            continue
        if len(cells) == len(header):
            yield TableRow(path, "line", number, {name: cells[index] for name, index in columns})
        elif cells:  # else an empty line
            fault = f"it has {len(cells)} cells, the header has {len(header)}"
            yield TableRow(path, "line", number, fault=fault)


def _open_after_header(path: Path) -> tuple[list[str], Any]:
    """Return the column names of a CSV or TSV file, and a csv.reader that continues with the first row."""
    # 1. Read lines up to the first one that is not blank, which names the columns, to find the delimiter.
    # 2. Pass these lines again to a reader with this delimiter, so that it counts the lines of the file.
    lines = table_lines(path)
    first_lines: list[str] = []  # blank lines, and the header
    for line in lines:
        first_lines.append(line if line.strip() else "")
        if first_lines[-1]:
            break
    header = first_lines[-1] if first_lines else ""
    if not header:
        raise DatasetError(f"{path} is empty; its first line names the columns")
    kind = _get_format_name(path)
    if kind == TSV or ("," not in header and ";" not in header and "\t" in header):
        delimiter = "\t"
    else:
        # spreadsheets write semicolons in languages with decimal commas
        delimiter = ";" if "," not in header and ";" in header else ","
    separator_line = re.fullmatch(r"sep=(.) *", header) if kind == CSV else None
    if separator_line is not None:  # as spreadsheets write it: the next line names the columns
        delimiter = separator_line[1]
        first_lines[-1] = ""
    lines_with_ends = (f"{line}\n" for line in itertools.chain(first_lines, lines))
    rows = csv.reader(lines_with_ends, delimiter=delimiter, strict=True)
    names = _read_names(path, rows, len(first_lines))
    check_names(path, names)
    return names, rows


def _read_names(path: Path, rows: Iterator[list[str]], line_number: int) -> list[str]:
    """Return the column names in the first row that is not empty; `line_number` is for messages."""
    try:
        return [name.strip() for name in next(row for row in rows if row)]
    except StopIteration:
        raise DatasetError(f"{path} ends before the names of its columns") from None
    except csv.Error as error:
        raise DatasetError(
            f"{path}, line {line_number}: the names of the columns cannot be read: {error}"
        ) from None
