"""Read captions from lists beside the files of a folder: metadata.jsonl, captions.csv, JSON files.

`new` writes them into caption files, which everything else reads.
"""

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.sources.captions import guess_of_editor
from dataset.sources.columns import FORMATS, PARQUET, column_names, read_columns
from dataset.sources.rows import check_text
from dataset.sources.tables import CAPTION_COLUMNS, PATH_COLUMNS
from modules.console import count_of, list_some
from modules.errors import DatasetError
from modules.limits import MAX_METADATA_BYTES
from modules.text_encodings import guess_encoding
from modules.text_files import parse_json, read_content, read_text

JSON = ".json"
# names of columns, besides those that tables of a dataset have
PATHS = (
    *("image_path", "video_path", "audio_path", *PATH_COLUMNS, "filename", "file", "file_path", "filepath"),
    *("image", "video", "audio", "image_file", "image_name", "name", "key"),
)
TEXTS = (*CAPTION_COLUMNS, "description", "label", "tags")
TABLE_KEY = "image_table_file or video_table_file in dataset.toml takes it"


@dataclass
class ListedCaptions:
    """Captions that lists have for the files of a folder."""

    by_path: dict[Path, str] = field(default_factory=dict)  # of a clip, picture or sound
    lists: dict[Path, int] = field(default_factory=dict)  # list -> how many files it has captions for
    looked: set[Path] = field(default_factory=set)  # all lists; those without captions have a line
    lines: list[str] = field(default_factory=list)  # about lists, and rows in them, that are not read


def read_lists(files: Mapping[Path, Collection[Path]], ignored: Collection[str]) -> ListedCaptions:
    """Return the captions that lists in folders have for media.

    files: folder -> its media. ignored: names of files that are no lists.
    """
    found = ListedCaptions()
    known = _by_name([media for each in files.values() for media in each])
    for folder, media in files.items():
        stems = {one.stem: one for one in media}
        for path in _lists_in(folder, ignored):
            beside = stems.get(path.stem) if path.suffix.lower() == JSON else None
            remarks: list[str] = []
            found.looked.add(path)
            try:
                rows = list(_rows_of(path, beside, {one.name for one in media}, remarks))
            except (DatasetError, OSError, ValueError) as error:
                found.lines.append(f"left out: {_explain(path, error)}")
                continue
            _add_rows(found, path, rows, known)
            found.lines += remarks
    return found


def _lists_in(folder: Path, ignored: Collection[str]) -> list[Path]:
    kinds = {*FORMATS, JSON}
    with contextlib.suppress(OSError):
        return [
            path
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in kinds
            and path.name not in ignored
            and path.name[0] != "."
            and path.is_file()
        ]
    return []


def _explain(path: Path, error: Exception) -> str:
    text = str(error) if isinstance(error, DatasetError) else f"{path} cannot be read: {error}"
    return text if str(path) in text else f"{path}: {text}"


def _by_name(media: Sequence[Path]) -> dict[Path, list[Path]]:
    """Return files by their path, and by their path without suffix."""
    by_stem: dict[Path, list[Path]] = {}
    for path in media:
        by_stem.setdefault(path.parent / path.stem, []).append(path)
    return by_stem | {path: [path] for path in media}


def _add_rows(
    found: ListedCaptions, path: Path, rows: Sequence[tuple[str, Any]], known: Mapping[Path, Sequence[Path]]
) -> None:
    """Add the captions of one list. rows: names as the list has them, and captions. known: of `_by_name`."""
    missing, bad, count = list[str](), list[str](), 0
    for name, caption in rows:
        media = _find_media(path.parent, name, known)
        if media is None:
            missing.append(name)
        elif not isinstance(caption, str) or not caption.strip():
            bad.append(media.name)
        else:
            try:
                check_text(caption, f"{path}: {media.name}")
            except DatasetError:
                bad.append(media.name)
                continue
            found.by_path.setdefault(media, caption.strip())
            count += 1
    if count:
        found.lists[path] = count
    elif not rows or len(missing) == len(rows):
        hint = "" if path.suffix.lower() == JSON else f". {TABLE_KEY}"
        found.lines.append(f"{path.name}: left out, it has captions for none of the files{hint}")
        return
    if missing:
        names = list_some(missing)
        found.lines.append(
            f"{path.name}: {count_of(len(missing), 'row')} for files that are not here: {names}"
        )
    if bad:
        found.lines.append(f"{path.name}: no text as caption for {list_some(bad)}")


def _find_media(folder: Path, name: str, known: Mapping[Path, Sequence[Path]]) -> Path | None:
    """Return the file that a list in a folder names: by its path, its name, or its name without suffix."""
    inside = Path(os.path.normpath(folder / name.replace("\\", "/")))
    for path in (inside, folder / inside.name):
        same = known.get(path, ())
        if len(same) == 1:
            return same[0]
    return None


def _rows_of(
    path: Path, beside: Path | None, names: Collection[str], remarks: list[str]
) -> Iterator[tuple[str, Any]]:
    """Yield the names and captions of a list. beside: the file that a JSON file of its name is about.

    names: of the media in its folder. remarks: takes lines about what is read in another way. Raises
    DatasetError, OSError or ValueError if it cannot be read.
    """
    if path.suffix.lower() != JSON:
        with _as_table(path, names, remarks) as table:
            yield from _table_rows(path, table, remarks)
        return
    content = parse_json(read_text(path, MAX_METADATA_BYTES))
    if beside is not None and isinstance(content, dict):
        yield beside.name, _first_text(content)
    elif isinstance(content, dict):
        for name, value in content.items():
            yield name, _first_text(value) if isinstance(value, dict) else value
    elif isinstance(content, list):
        for row in content:
            name = next((row[key] for key in PATHS if key in row), None) if isinstance(row, dict) else None
            if isinstance(name, str):
                yield name, _first_text(row)


def _first_text(row: Mapping[str, Any]) -> Any:
    return next((row[name] for name in TEXTS if isinstance(row.get(name), str)), None)


def _table_rows(path: Path, table: Path, remarks: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a table. path: for messages. Raises DatasetError if it lacks a column."""
    columns = column_names(table)
    lower = {name.lower(): name for name in reversed(columns)}
    name_column, text_column = (
        next((lower[name] for name in usual if name in lower), None) for usual in (PATHS, TEXTS)
    )
    if name_column is None or text_column is None:
        needs = "names of files (file_name)" if name_column is None else "captions (text)"
        raise DatasetError(f"{path} has no column of {needs}; it has {list_some(columns)}. {TABLE_KEY}")
    for row in read_columns(table, {name_column, text_column}):
        if row.fault is not None:
            hint = "Put a caption that has commas in quotes"
            remarks.append(f"{path.name}, line {row.number}: left out, {row.fault}. {hint}")
        name = row.values.get(name_column)
        if isinstance(name, str) and name.strip():
            yield name.strip(), row.values.get(text_column)


@contextlib.contextmanager
def _as_table(path: Path, names: Collection[str], remarks: list[str]) -> Iterator[Path]:
    """Yield a table as `read_columns` reads it: in UTF-8, and with the names of its columns in line 1.

    Spreadsheets write other encodings, and lists made by hand begin with the first file.
    """
    if FORMATS[path.suffix.lower()] == PARQUET:
        yield path
        return
    content = read_content(path, MAX_METADATA_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        guess = guess_of_editor(content) or guess_encoding(content)
        if guess is None:
            raise DatasetError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
        text = guess.text.removeprefix("\ufeff")
        remarks.append(f"{path.name}: not UTF-8, and read as {guess.name}")
    first = text.split("\n", 1)[0]
    mark = next((sign for sign in "\t,;" if sign in first), ",")
    if path.suffix.lower() in {".csv", ".tsv", ".tab"} and first.split(mark)[0].strip(' "\r') in names:
        text = f"file_name{mark}text\n{text}"
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / path.name
        copied.write_text(text, encoding="utf-8", newline="")
        try:
            yield copied
        except DatasetError as error:
            raise DatasetError(str(error).replace(str(copied), str(path))) from None
