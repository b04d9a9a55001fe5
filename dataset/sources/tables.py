"""List the sources that a file names: a JSONL list, a table of any format, or a metadata JSON."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset.config import DatasetTable
from dataset.sources.captions import captions_in, lines_of, not_utf8
from dataset.sources.columns import (
    JSONL,
    PARQUET,
    TableRow,
    column_names,
    read_columns,
    read_jsonl,
    table_format,
)
from dataset.sources.media_source import Fault, MediaSource, ParquetCell, readable_stem, unique_stems
from dataset.sources.parquet import cell_column, cells_of, parquet_parts
from dataset.sources.rows import PATH_COLUMNS, Part, RefusedAddress, RowReader, control_number
from modules.errors import DatasetError
from modules.limits import MAX_METADATA_BYTES
from modules.media.reading import image_suffixes
from modules.paths import check_length, expand_path, is_address
from modules.text_files import bad_character, parse_json, read_text

logger = logging.getLogger(__name__)

CAPTION_COLUMNS = ("caption", "text", "prompt")  # in order; the first that a table has is used
FIRST_ROWS = 100  # of which one shows where relative paths start
MOST_SHOWN = 20  # columns in a message
SIZE_KEY = "train_resolution"  # in one, written by the preparing scripts of image trainers


def list_rows(table: DatasetTable, faults: list[Fault]) -> list[MediaSource]:
    """Return the sources of a list or a table, in any order; add errors to `faults`, with numbers of rows.

    Relative paths start in the working folder, or in the folder of the file if the first medium is there.
    Raises DatasetError if the file cannot be read or has no paths.
    """
    path = table.jsonl_file or table.table_file
    assert path is not None
    if not path.exists():
        raise DatasetError(f"{table.name}: {table.source_key} = {path}: no such file. Correct the path.")
    cells: dict[str, Cells] = {}
    if table.jsonl_file is not None:
        name = table.path_key
        base = _base_of(path, name, read_jsonl(path, [name]))
        reader = RowReader(table, path, name, is_list=True, base=base)
        rows = read_jsonl(path, None, example=f'{{"{name}": "...", "caption": "..."}}')
    else:
        reader, cells, columns = _open_table(table, path)
        rows = read_columns(path, columns)
    sources = []
    kind = f"{reader.unit}s of {path} cannot be used"
    for row in rows:
        try:
            sources.append(_read_row(reader, row, cells))
        except RefusedAddress as refused:
            faults.append(Fault(f"{kind}: {refused.reason}", refused.shown))
        except DatasetError as error:
            faults.append(Fault(kind, f"{str(error).rstrip('.')}."))
    return reader.finish(sources, faults)


def _read_row(reader: RowReader, row: TableRow, cells: Mapping[str, "Cells"]) -> MediaSource:
    """Return the source of a row. cells: by column, finders of files in rows. Raises DatasetError."""
    if row.fault is not None:
        raise DatasetError(f"{row.where}: {row.fault}")
    if not cells:
        return reader.read(row.values, row.where)
    media: tuple[str, Part] | None = None
    values = {**row.values}
    for column, find_cell in cells.items():
        origin = find_cell(row)
        if origin is None:  # null: the row has no such file
            continue
        name = f"{row.number:08d}"
        if column == reader.path_column:  # `train-00000-of-00002_00000012`
            stem = f"{readable_stem(row.file.stem).replace('.', '_')}_{name}"
            media = stem, (row.file / name, origin)
        else:
            values[column] = row.file / f"{name} {readable_stem(column)}", origin
    return reader.read(values, row.where, media)


Cells = Callable[[TableRow], ParquetCell | None]


def _open_table(table: DatasetTable, path: Path) -> tuple[RowReader, dict[str, Cells], set[str] | None]:
    """Return the reader of a table's rows; column -> function that finds its files, for columns that hold
    files; and the columns to read (None: all).
    """
    columns = column_names(path)
    path_column, caption_column = choose_columns(table, columns)
    names = names_read(table, path_column, caption_column or "")
    for name in columns:
        if control_number(name) is not None or control_number(name, "reference_path") is not None:
            names.add(name)
    cells = {}
    for name in names - {"audio_path", caption_column}:
        find_cell = find_cells(path, name, name != path_column)
        if find_cell is not None:
            cells[name] = find_cell
    names -= cells.keys()
    base = None if path_column in cells else _base_of(path, path_column, read_columns(path, [path_column]))
    reader = RowReader(table, path, path_column, caption_column, base=base)
    return reader, cells, None if table_format(path) == JSONL else names


def choose_columns(table: DatasetTable, columns: Sequence[str]) -> tuple[str, str | None]:
    """Return the columns of a table's media and captions; None for captions if the table has none.

    Raises DatasetError if the column of the media, or a column that a key names, is missing.
    """
    path_column = _choose(table, "path_column", (f"{table.kind}_path", *PATH_COLUMNS), columns)
    if path_column is None and table.kind not in columns:
        usual = ", ".join((f"{table.kind}_path", *PATH_COLUMNS, table.kind))
        raise DatasetError(
            f"{table.name}: none of the columns {usual} is there. Name the one with the paths: "
            f"path_column = ... It has {_shown(columns)}."
        )
    _choose(table, "control_column", (), columns)
    return path_column or table.kind, _choose(table, "caption_column", CAPTION_COLUMNS, columns)


def names_read(table: DatasetTable, path_column: str, caption_column: str) -> set[str]:
    names = {path_column, caption_column, table.control_column or "", "mask_path", "control_mask_path"}
    names.add("worse_path")
    if table.multi_caption:
        names.add("captions")
    if table.kind == "video":
        names.add("audio_path")
    return names - {""}


def find_cells(path: Path, name: str, finds_nulls: bool) -> Cells | None:
    """Return a function row -> place of its file if the column `name` holds files; None if it does not.

    finds_nulls: see `cells_of`.
    """
    if table_format(path) != PARQUET:
        return None
    parts = parquet_parts(path)
    column = cell_column(parts[0], name)
    if column is None:
        return None
    places = {part: cells_of(part, column, finds_nulls) for part in parts}
    return lambda row: places[row.file](row.number)


def _choose(table: DatasetTable, key: str, usual: Sequence[str], columns: Sequence[str]) -> str | None:
    """Return the column that a key names, or the first of the usual ones; None if they are missing."""
    named: str | None = getattr(table, key)
    if named is None:
        return next((name for name in usual if name in columns), None)
    if named not in columns:
        raise DatasetError(f"{table.name}: {key} = {named!r} is not a column. It has {_shown(columns)}.")
    return named


def _shown(columns: Sequence[str]) -> str:
    if not columns:
        return "no columns"
    shown = ", ".join(map(repr, columns[:MOST_SHOWN]))
    return f"{shown} and {len(columns) - MOST_SHOWN} more" if len(columns) > MOST_SHOWN else shown


def _base_of(path: Path, column: str, rows: Iterable[TableRow]) -> Path | None:
    """Return the folder that relative paths start in; None: the working folder, also if no file is found.

    rows: those of the list or table at `path`, with the column of its media.
    """
    folder = path if path.is_dir() else path.parent
    for row in itertools.islice(rows, FIRST_ROWS):
        text = row.values.get(column)
        if not isinstance(text, str) or "\0" in text or not text.strip() or is_address(text):
            continue
        with contextlib.suppress(ValueError):  # of a name that no file can have, which its row reports
            file = expand_path(text)
            if file.is_absolute():
                continue
            beside = expand_path(text, folder)
            if file.exists():
                if beside.exists() and not file.samefile(beside):
                    logger.warning(
                        "%s: %s is both in the working folder and in %s: the first is used. Write absolute "
                        "paths, or start in another folder, if that is wrong.",
                        path,
                        text,
                        folder,
                    )
                return None
            if beside.exists():
                return folder
    return None


# --- a metadata JSON of image trainers
# ------------------------------------------------------------------------------------------------------------


def list_metadata(table: DatasetTable, faults: list[Fault]) -> list[MediaSource]:
    """Return a source for each picture that a table's metadata_file names, with its captions and tags.

        {"cat.png": {"caption": "a cat", "tags": "red, chair"}, "sub/dog": {"tags": "dog"}}

    A key is a path, or a name in the table's folder of pictures, with or without its suffix. Raises
    DatasetError if the file cannot be read. Faults of single entries are added to `faults`.
    """
    path = table.metadata_file
    assert path is not None
    try:
        content = parse_json(read_text(path, MAX_METADATA_BYTES))
    except UnicodeDecodeError:
        raise not_utf8(path, 0) from None
    except OSError as error:
        raise DatasetError(
            f"{table.name}: metadata_file = {path}: {error.strerror}. Correct the path."
        ) from error
    except ValueError as error:
        raise DatasetError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise DatasetError(
            f'{path}: the top level must be an object with a picture for each key: {{"cat": {{"caption": '
            '"a cat"}}'
        )
    listed: dict[Path, dict[str, Path]] = {}
    pictures: list[Path] = []
    texts: list[str | None] = []
    for key, entry in content.items():
        try:
            picture = _find_picture(key, table.image_folder, listed)
            text = _caption(entry, table)
        except (ValueError, OSError) as error:
            faults.append(Fault(f"entries of {path} cannot be used", f"{key[:200]!r}: {error}."))
            continue
        pictures.append(picture)
        texts.append(text)
    if any(isinstance(entry, dict) and SIZE_KEY in entry for entry in content.values()):
        logger.info(
            "%s: %s is not needed: the sizes of pictures are read from the pictures", table.name, SIZE_KEY
        )
    stems = unique_stems([picture.stem for picture in pictures], [str(picture) for picture in pictures])
    sources = []
    for picture, text, stem in zip(pictures, texts, stems, strict=True):
        caption = None if text is None else captions_in(text, table)[0]
        source = MediaSource(
            path=picture, stem=stem, caption=caption, caption_path=None, control=(), table=table
        )
        sources.append(source)
    return sources


def _find_picture(key: str, folder: Path | None, listed: dict[Path, dict[str, Path]]) -> Path:
    """Return the picture of a key of a metadata file. Raises ValueError if there is none.

    listed: by folder, its pictures by name without suffix; a folder that is missing there is added.
    """
    if bad_character(key) or not key.strip():
        raise ValueError("this is not a path")
    path = Path(key) if folder is None else folder / key
    check_length(path)
    if path.suffix.lower() in image_suffixes() and path.is_file():
        return path
    parent = path.parent
    if parent not in listed:
        entries = sorted(parent.iterdir(), reverse=True) if parent.is_dir() else []
        listed[parent] = {entry.stem: entry for entry in entries if entry.suffix.lower() in image_suffixes()}
    if path.name not in listed[parent]:
        raise ValueError(f"there is no such picture{'' if folder is None else f' in {folder}'}")
    return listed[parent][path.name]


def _caption(entry: Any, table: DatasetTable) -> str | None:
    """Return the text of an entry: its caption, then its tags; with wildcards the tags end every line.

    Raises ValueError if a value is not a text.
    """
    if not isinstance(entry, dict):
        raise ValueError("its value is not an object with caption or tags")
    texts = {name: "" if entry.get(name) is None else entry[name] for name in ("caption", "tags")}
    for name, text in texts.items():
        if not isinstance(text, str) or bad_character(text):
            raise ValueError(f"{name} is not a text")
    caption, tags = (text.strip() for text in texts.values())
    separator = table.changes.separator
    if caption and tags:
        tags = separator.join(lines_of(tags)) if table.changes.wildcards else tags
        lines = lines_of(caption) if table.changes.wildcards else [caption]
        return "\n".join(f"{line}{separator} {tags}" for line in lines)
    return caption or tags or table.class_tokens
