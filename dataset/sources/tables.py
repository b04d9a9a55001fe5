"""List the sources of a table with image_table_file or video_table_file: Parquet, CSV, TSV, JSONL."""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dataset.config import DatasetTable
from dataset.sources.columns import (
    JSONL,
    PARQUET,
    TableRow,
    column_names,
    parquet_parts,
    read_columns,
    table_format,
)
from dataset.sources.faults import Fault
from dataset.sources.media_source import MediaSource
from dataset.sources.origin import ParquetCell
from dataset.sources.parquet_cells import cell_column, cells_of
from dataset.sources.rows import RowReader, control_number
from dataset.sources.stems import readable_stem
from modules.errors import DatasetError
from modules.paths import expand_path, is_address

# in order; the first that a table has is used. Behind them all: a column `image` or `video`, of paths or of
# whole files
PATH_COLUMNS = ("path", "file_name", "url")  # behind image_path or video_path
CAPTION_COLUMNS = ("caption", "text", "prompt")
FIRST_ROWS = 100  # of which one shows where relative paths start
MOST_SHOWN = 20  # columns in a message


def list_table(table: DatasetTable, faults: list[Fault]) -> list[MediaSource]:
    """Return the sources of the table, in any order; add errors to `faults`, with the numbers of rows.

    Relative paths start in the working folder, as in lists, or in the folder of the table: the one with the
    first file. Raises DatasetError if the table cannot be read or has no paths.
    """
    path = table.table_file
    assert path is not None
    columns = column_names(path)
    path_column = _choose(table, "path_column", (f"{table.kind}_path", *PATH_COLUMNS), columns)
    cells = _cells(path, path_column or table.kind)
    if path_column is None and table.kind not in columns:
        raise DatasetError(_no_column(table, columns))
    caption_column = _choose(table, "caption_column", CAPTION_COLUMNS, columns)
    path_column = path_column or table.kind
    base = None if cells else _base_of(path, path_column)
    rows = RowReader(table, path, path_column, caption_column, base=base)
    wanted = {"mask_path", *(name for name in columns if control_number(name) is not None)}
    wanted |= {"captions"} if table.multi_caption else set()
    wanted |= {one for one in (caption_column, None if cells else path_column) if one is not None}
    sources = []
    kind = f"rows of {path} cannot be used"
    for row in read_columns(path, None if table_format(path) == JSONL else wanted):
        try:
            if row.fault is not None:
                raise DatasetError(f"{row.where}: {row.fault}")
            if cells is None:
                source = rows.read(row.values, row.where)
            else:
                source = rows.read({**row.values, path_column: _cell_name(row)}, row.where)
                source = source and _with_cell(source, row, cells(row))
            sources += [] if source is None else [source]
        except DatasetError as error:
            faults.append(Fault(kind, f"{str(error).rstrip('.')}."))
    return rows.finish(sources, faults)


def _cells(path: Path, name: str) -> Callable[[TableRow], ParquetCell] | None:
    """Return a function row -> place of its file if the column `name` holds files; None if it does not."""
    if table_format(path) != PARQUET:
        return None
    parts = parquet_parts(path)
    column = cell_column(parts[0], name)
    if column is None:
        return None
    places = {part: cells_of(part, column) for part in parts}
    return lambda row: places[row.file](row.number)


def _cell_name(row: TableRow) -> str:
    """Return the name of a file in a row: `train-00000-of-00002_00000012`."""
    return f"{readable_stem(row.file.stem).replace('.', '_')}_{row.number:08d}"


def _with_cell(source: MediaSource, row: TableRow, cell: ParquetCell) -> MediaSource:
    others = source.origins[1:] or (None,) * (len(source.parts) - 1)
    return replace(source, path=row.file / f"{row.number:08d}", origins=(cell, *others))


def _choose(table: DatasetTable, key: str, usual: Sequence[str], columns: Sequence[str]) -> str | None:
    """Return the column that a key names, or the first of the usual ones; None if they are missing."""
    named: str | None = getattr(table, key)
    if named is None:
        return next((name for name in usual if name in columns), None)
    if named not in columns:
        raise DatasetError(f"{table.name}: {key} = {named!r} is not a column. It has {_shown(columns)}.")
    return named


def _no_column(table: DatasetTable, columns: Sequence[str]) -> str:
    usual = ", ".join((f"{table.kind}_path", *PATH_COLUMNS, table.kind))
    return (
        f"{table.name}: none of the columns {usual} is there. Name the one with the paths: "
        f"path_column = ... It has {_shown(columns)}."
    )


def _shown(columns: Sequence[str]) -> str:
    more = f" and {len(columns) - MOST_SHOWN} more" if len(columns) > MOST_SHOWN else ""
    return ", ".join(map(repr, columns[:MOST_SHOWN])) + more if columns else "no columns"


def _base_of(path: Path, column: str) -> Path | None:
    """Return the folder that relative paths start in; None: the working folder, also if no file is found."""
    beside = path if path.is_dir() else path.parent
    for row in itertools.islice(read_columns(path, [column]), FIRST_ROWS):
        text = row.values.get(column)
        if not isinstance(text, str) or "\0" in text or not text.strip() or is_address(text):
            continue
        with contextlib.suppress(ValueError):  # of a name that no file can have, which its row reports
            found = expand_path(text)
            if found.is_absolute():
                continue
            if found.exists():
                return None
            if expand_path(text, beside).exists():
                return beside
    return None
