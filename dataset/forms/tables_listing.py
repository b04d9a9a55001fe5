"""Find the sources of a table in any format, and its unused columns."""

from collections.abc import Container, Iterable, Sequence

from dataset.forms.contract import InspectedColumns
from dataset.forms.jsonl import JSON_LINES
from dataset.forms.row_formats import column_names, find_cells, plain_columns, read_columns, row_format
from dataset.forms.rows import (
    CAPTION_COLUMNS,
    PATH_COLUMNS,
    RowReader,
    find_base,
    is_companion,
    is_control,
    list_rows,
    names_read,
    require_file,
)
from dataset.sources.media_source import Fault, MediaSource
from dataset.table import DatasetTable
from modules.errors import DatasetError

MAX_SHOWN = 20  # columns in a message


def list_table(table: DatasetTable, path_column: str | None, faults: list[Fault]) -> list[MediaSource]:
    """Return the media files that a table names, in any order; add errors, with row numbers, to `faults`.

    `path_column` is the value of the key in the dataset file.

    Raises:
        DatasetError: If the file cannot be read or has no paths.
    """
    path = require_file(table)
    columns = column_names(path)
    media_column, caption_column = _select_columns(table, path_column, columns)
    names = names_read(table, media_column, caption_column or "")
    names |= {name for name in columns if is_companion(name)}
    # for each column whose cells contain files, a function that finds the file of a row; not for audio, which
    # is always named by path, and captions, which are strings
    cell_finders = {}
    for name in names - {"audio_path", caption_column}:
        # an empty media cell is an error; in other columns it means that the row has no such file
        find_cell = find_cells(path, name, finds_nulls=name != media_column)
        if find_cell is not None:
            cell_finders[name] = find_cell
    value_columns = names - cell_finders.keys()
    base_folder = None
    if media_column not in cell_finders:  # a column of paths
        base_folder = find_base(path, media_column, read_columns(path, [media_column]))
    reader = RowReader(table, path, media_column, caption_column, base=base_folder)
    # the columns of JSON Lines come from the first lines only, so all keys are read
    rows = read_columns(path, None if row_format(path) is JSON_LINES else value_columns)
    return list_rows(reader, rows, faults, cell_finders)


def _select_columns(
    table: DatasetTable, path_column: str | None, columns: Sequence[str]
) -> tuple[str, str | None]:
    """Return the media column and the caption column; the second is None if the table has no captions."""
    # `path_column` is the value in the dataset file.
    columns_by_key = {
        "path_column": path_column,
        "control_column": table.references.control_column,
        "caption_column": table.captions.caption_column,
    }
    default_media = (f"{table.kind}_path", *PATH_COLUMNS)
    media_column = path_column or _find_first(default_media, columns)
    if media_column is None and table.kind not in columns:
        default = ", ".join((*default_media, table.kind))
        raise DatasetError(
            f"{table.name}: none of the columns {default} exists. Name the one with the paths: "
            f"path_column = ... It has {_shown(columns)}."
        )
    for key, name in columns_by_key.items():
        if name is not None and name not in columns:
            raise DatasetError(f"{table.name}: {key} = {name!r} is not a column. It has {_shown(columns)}.")
    caption = table.captions.caption_column or _find_first(CAPTION_COLUMNS, columns)
    # a column called "image" or "video" contains the files themselves, or their paths
    return media_column or table.kind, caption


def _find_first(names: Iterable[str], columns: Container[str]) -> str | None:
    """Return the first of these names that is a column; None if there is none."""
    return next((name for name in names if name in columns), None)


def _shown(columns: Sequence[str]) -> str:
    """Return column names as text for a message, at most MAX_SHOWN."""
    if not columns:
        return "no columns"
    shown = ", ".join(map(repr, columns[:MAX_SHOWN]))
    return f"{shown} and {len(columns) - MAX_SHOWN} more" if len(columns) > MAX_SHOWN else shown


def inspect_table(table: DatasetTable, path_column: str | None) -> InspectedColumns:
    """Return a table's columns, for warnings; `path_column` is the value in the dataset file.

    Raises:
        DatasetError: If the table cannot be listed.
    """
    path = table.source.path
    columns = column_names(path)
    media_column, caption_column = _select_columns(table, path_column, columns)
    # the media column is inspected, too, because warnings compare other cells with it
    used_columns = names_read(table, media_column, caption_column or "") - {media_column}
    inspected_columns = [name for name in columns if name not in used_columns and not is_companion(name)]
    control_columns = [name for name in columns if is_control(table, name)]
    # only values are read, not the files that some columns contain
    value_columns, file_columns = plain_columns(path, [*inspected_columns, *control_columns])
    return InspectedColumns(
        media_column,
        columns_read=names_read(table, media_column, ""),  # no caption column: `rows` lacks it
        unread_file_columns=[name for name in file_columns if name != media_column],
        rows=read_columns(path, value_columns),
    )
