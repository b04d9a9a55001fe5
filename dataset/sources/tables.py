"""List the sources that a file names: a JSONL list, a table of any format, or a metadata JSON."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence
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
from dataset.sources.rows import RefusedAddress, RowReader, control_number
from modules.errors import DatasetError
from modules.limits import MAX_METADATA_BYTES
from modules.media.reading import image_suffixes
from modules.paths import check_length, expand_path, is_address
from modules.text_files import bad_character, parse_json, read_text

logger = logging.getLogger(__name__)

# in order; the first that a table has is used. Behind them all: a column `image` or `video`, of paths or of
# whole files
PATH_COLUMNS = ("path", "file_name", "url")  # behind image_path or video_path
CAPTION_COLUMNS = ("caption", "text", "prompt")
FIRST_ROWS = 100  # of which one shows where relative paths start
MOST_SHOWN = 20  # columns in a message
SIZE_KEY = "train_resolution"  # in one, written by the preparing scripts of image trainers


def list_rows(table: DatasetTable, faults: list[Fault]) -> list[MediaSource]:
    """Return the sources of a list or a table, in any order; add errors to `faults`, with numbers of rows.

    Relative paths start in the working folder; those of a table also in its own, if the first file is there.
    Raises DatasetError if the file cannot be read or has no paths.
    """
    path = table.jsonl_file or table.table_file
    assert path is not None
    if not path.exists():
        raise DatasetError(f"{table.name}: {table.source_key} = {path}: no such file. Correct the path.")
    cells: dict[str, Cells] = {}
    if table.jsonl_file is not None:
        name = table.path_key
        rows = RowReader(table, path, name, is_list=True)
        found = read_jsonl(path, None, example=f'{{"{name}": "...", "caption": "..."}}')
    else:
        rows, cells, wanted = _open_table(table, path)
        found = read_columns(path, wanted)
    sources = []
    for row in found:
        try:
            if row.fault is not None:
                raise DatasetError(f"{row.where}: {row.fault}")
            held, values = None, {**row.values}
            for column, cell in cells.items():
                if (origin := cell(row)) is None:  # null: the row has no such file
                    continue
                place = row.file / f"{row.number:08d}", origin
                if column == rows.path_column:  # `train-00000-of-00002_00000012`
                    held = f"{readable_stem(row.file.stem).replace('.', '_')}_{row.number:08d}", place
                else:
                    values[column] = place[0].with_name(f"{place[0].name} {readable_stem(column)}"), origin
            sources.append(rows.read(values, row.where, held))
        except RefusedAddress as refused:
            faults.append(Fault(f"{rows.unit}s of {path} cannot be used: {refused.reason}", refused.shown))
        except DatasetError as error:
            kind = f"{rows.unit}s of {path} cannot be used"
            faults.append(Fault(kind, f"{str(error).rstrip('.')}."))
    return rows.finish(sources, faults)


Cells = Callable[[TableRow], ParquetCell | None]


def _open_table(table: DatasetTable, path: Path) -> tuple[RowReader, dict[str, Cells], set[str] | None]:
    """Return the reader of a table's rows; column -> function that finds its files, for columns that hold
    files; and the columns to read (None: all).
    """
    columns = column_names(path)
    path_column, caption_column = choose_columns(table, columns)
    wanted = names_read(table, path_column, caption_column or "")
    beside = "control_path", "reference_path"
    wanted |= {name for name in columns if any(control_number(name, one) is not None for one in beside)}
    media = wanted - {"audio_path", caption_column}
    cells = {
        name: cell for name in media if (cell := find_cells(path, name, name != path_column)) is not None
    }
    wanted -= cells.keys()
    base = None if path_column in cells else _base_of(path, path_column)
    rows = RowReader(table, path, path_column, caption_column, base=base)
    return rows, cells, None if table_format(path) == JSONL else wanted


def choose_columns(table: DatasetTable, columns: Sequence[str]) -> tuple[str, str | None]:
    """Return the columns of a table's media and captions, None without these.

    Raises DatasetError if a column that a key names is missing, or that of the media.
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
    names |= {"captions"} if table.multi_caption else set()
    return (names | ({"audio_path"} if table.kind == "video" else set())) - {""}


def find_cells(path: Path, name: str, finds_nulls: bool) -> Cells | None:
    """Return a function row -> place of its file if the column `name` holds files; None if it does not.

    finds_nulls: as of `cells_of`.
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
    found: list[tuple[Path, str | None]] = []
    for key, entry in content.items():
        try:
            picture = _find_picture(key, table.image_folder, listed)
            text = _caption(entry, table)
        except (ValueError, OSError) as error:
            faults.append(Fault(f"entries of {path} cannot be used", f"{key[:200]!r}: {error}."))
            continue
        found.append((picture, text))
    if any(isinstance(entry, dict) and SIZE_KEY in entry for entry in content.values()):
        logger.info(
            "%s: %s is not needed: the sizes of pictures are read from themselves", table.name, SIZE_KEY
        )
    stems = unique_stems([picture.stem for picture, _ in found], [str(picture) for picture, _ in found])
    return [
        MediaSource(picture, stem, None if text is None else captions_in(text, table)[0], None, (), table)
        for (picture, text), stem in zip(found, stems, strict=True)
    ]


def _find_picture(key: str, folder: Path | None, listed: dict[Path, dict[str, Path]]) -> Path:
    """Return the picture of a key of a metadata file. Raises ValueError if there is none.

    listed: by folder, its pictures by name without suffix; a folder that is missing there is added.
    """
    if bad_character(key) or not key.strip():
        raise ValueError("this is not a path")
    there = Path(key) if folder is None else folder / key
    check_length(there)
    if there.suffix.lower() in image_suffixes() and there.is_file():
        return there
    parent = there.parent
    if parent not in listed:
        entries = sorted(parent.iterdir(), reverse=True) if parent.is_dir() else []
        listed[parent] = {path.stem: path for path in entries if path.suffix.lower() in image_suffixes()}
    if there.name not in listed[parent]:
        raise ValueError(f"there is no such picture{'' if folder is None else f' in {folder}'}")
    return listed[parent][there.name]


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
