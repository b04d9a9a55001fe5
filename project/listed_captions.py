"""Read captions from lists next to the files of a folder: metadata.jsonl, captions.csv, JSON files.

`new` writes them into caption files, which everything else reads.
"""

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.forms.row_formats import FORMAT_BY_SUFFIX, column_names, read_columns
from dataset.forms.rows import CAPTION_COLUMNS, PATH_COLUMNS, check_text
from dataset.sources.captions import guess_windows_encoding
from modules.console import format_count, list_some
from modules.errors import DatasetError
from modules.limits import MAX_METADATA_BYTES
from modules.line_kinds import fault, warning
from modules.text_encodings import guess_encoding
from modules.text_files import parse_json, read_content, read_text

JSON = ".json"
# column names, in addition to the names in dataset tables
# fmt: off
ALL_PATH_COLUMNS = (
    "image_path", "video_path", "audio_path", *PATH_COLUMNS, "filename", "file", "file_path", "filepath",
    "image", "video", "audio", "image_file", "image_name", "name", "key",
)
# fmt: on
ALL_CAPTION_COLUMNS = (*CAPTION_COLUMNS, "description", "label", "tags")
TABLE_KEY = "use it as image_table_file or video_table_file in dataset.toml"


@dataclass
class ListedCaptions:
    """Captions found in list files, such as CSV or JSON, for media files in the same folder."""

    # captions by the path of their clip, image or audio file
    by_path: dict[Path, str] = field(default_factory=dict)
    num_captions_by_list: dict[Path, int] = field(default_factory=dict)
    # all lists that were read; those without captions are reported
    list_paths: set[Path] = field(default_factory=set)
    report_lines: list[str] = field(default_factory=list)  # messages about skipped lists and rows


def read_lists(files: Mapping[Path, Collection[Path]], ignored: Collection[str]) -> ListedCaptions:
    """Read captions for media files from lists (JSON or tables) in the same folders.

    Args:
        files: The media of each folder.
        ignored: Names of files that are not lists.
    """
    caption_lists = ListedCaptions()
    media_by_name = _index_media_by_name([path for media in files.values() for path in media])
    for folder, media in files.items():
        by_stem = {path.stem: path for path in media}
        names = {path.name for path in media}
        for path in _lists_in(folder, ignored):
            caption_lists.list_paths.add(path)
            # cat.json may contain the caption of cat.png without naming the file
            described_media = by_stem.get(path.stem) if path.suffix.lower() == JSON else None
            remarks: list[str] = []
            try:
                rows = list(_read_rows(path, described_media, names, remarks))
            except (DatasetError, OSError, ValueError) as error:
                caption_lists.report_lines.append(fault(f"left out: {_explain(path, error)}"))
                continue
            _add_list_captions(caption_lists, path, rows, media_by_name)
            caption_lists.report_lines += remarks
    return caption_lists


def _lists_in(folder: Path, ignored: Collection[str]) -> list[Path]:
    kinds = {*FORMAT_BY_SUFFIX, JSON}
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


def _index_media_by_name(media: Sequence[Path]) -> dict[Path, list[Path]]:
    """Return the media files by path and by path without suffix, to look up names in a list of captions."""
    by_stem: dict[Path, list[Path]] = {}
    for path in media:
        by_stem.setdefault(path.parent / path.stem, []).append(path)
    return by_stem | {path: [path] for path in media}


def _add_list_captions(
    caption_lists: ListedCaptions,
    path: Path,
    rows: Sequence[tuple[str, Any]],
    media_by_name: Mapping[Path, Sequence[Path]],
) -> None:
    """Add a list's captions to `caption_lists`, with lines about rows that cannot be used."""
    # `rows` are pairs (file name, caption). `media_by_name` maps paths with and without suffix to media
    # files.
    missing_names: list[str] = []
    files_without_text: list[str] = []
    num_captions = 0
    for name, caption in rows:
        media = _find_media(path.parent, name, media_by_name)
        if media is None:
            missing_names.append(name)
        elif not _is_text(caption, f"{path}: {media.name}"):
            files_without_text.append(media.name)
        else:
            # if several lists have a caption, the first one decides
            caption_lists.by_path.setdefault(media, caption.strip())
            num_captions += 1
    if num_captions:
        caption_lists.num_captions_by_list[path] = num_captions
    if len(missing_names) == len(rows):  # a list of other files needs no message for each row
        hint = "" if path.suffix.lower() == JSON else f". {TABLE_KEY}"
        text = f"{path.name}: left out, it has captions for none of the files{hint}"
        caption_lists.report_lines.append(warning(text))
    else:
        # Lines about a list's rows for files that do not exist, and rows without a text
        lines = []
        if missing_names:
            row_count = format_count(len(missing_names), "row")
            lines.append(f"{path.name}: {row_count} for files that are not here: {list_some(missing_names)}")
        if files_without_text:
            lines.append(f"{path.name}: no text caption for {list_some(files_without_text)}")
        caption_lists.report_lines += lines


def _is_text(caption: Any, place: str) -> bool:
    """Return whether a caption can be written to a caption file: a string without invalid characters."""
    if not isinstance(caption, str) or not caption.strip():
        return False
    try:
        check_text(caption, place)
    except DatasetError:
        return False
    return True


def _find_media(folder: Path, name: str, media_by_name: Mapping[Path, Sequence[Path]]) -> Path | None:
    """Return the media file that a list entry names, with or without folder and suffix; None if unclear."""
    inside = Path(os.path.normpath(folder / name.replace("\\", "/")))
    for path in (inside, folder / inside.name):
        candidates = media_by_name.get(path, ())
        if len(candidates) == 1:
            return candidates[0]
    return None


def _read_rows(
    path: Path, described_media: Path | None, names: Collection[str], remarks: list[str]
) -> Iterator[tuple[str, Any]]:
    """Yield (file name, caption) for each row of a list of captions."""
    if path.suffix.lower() == JSON:
        content = parse_json(read_text(path, MAX_METADATA_BYTES))
        # The file is about one image or clip, or a table of captions by file name, or a list of rows.
        # `described_media` is the media file with the name of the JSON file, None if there is none.
        if isinstance(content, list):
            yield from _read_json_list(content)
        elif isinstance(content, dict) and described_media is not None:
            yield described_media.name, _first_text(content)
        elif isinstance(content, dict):
            for name, entry in content.items():
                yield name, _first_text(entry) if isinstance(entry, dict) else entry
    else:
        with _open_as_table(path, names, remarks) as table:
            # Yield (file name, caption) for each row of a caption table. `path` is for messages only.
            columns = column_names(table)
            name_column = _find_column(columns, ALL_PATH_COLUMNS)
            caption_column = _find_column(columns, ALL_CAPTION_COLUMNS)
            if name_column is None or caption_column is None:
                needs = "names of files (file_name)" if name_column is None else "captions (text)"
                raise DatasetError(
                    f"{path} has no column of {needs}; it has {list_some(columns)}. {TABLE_KEY}"
                )
            for row in read_columns(table, {name_column, caption_column}):
                if row.fault is not None:  # such a row has no values, so nothing is yielded for it
                    hint = "Put a caption that has commas in quotes"
                    remarks.append(warning(f"{path.name}, line {row.number}: left out, {row.fault}. {hint}"))
                name = row.values.get(name_column)
                if isinstance(name, str) and name.strip():
                    yield name.strip(), row.values.get(caption_column)


def _read_json_list(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yield (file name, caption) for each row that has a column with the file's name."""
    for row in rows:
        if isinstance(row, dict):
            name = next((row[key] for key in ALL_PATH_COLUMNS if key in row), None)
            if isinstance(name, str):
                yield name, _first_text(row)


def _first_text(row: Mapping[str, Any]) -> Any:
    return next((row[name] for name in ALL_CAPTION_COLUMNS if isinstance(row.get(name), str)), None)


def _find_column(columns: Sequence[str], known_names: Iterable[str]) -> str | None:
    """Return the table's column with the first known name that it has, in any case; None if it has none."""
    # reversed: if columns differ only in case, the first one is used
    by_lower_name = {name.lower(): name for name in reversed(columns)}
    return next((by_lower_name[name] for name in known_names if name in by_lower_name), None)


@contextlib.contextmanager
def _open_as_table(path: Path, names: Collection[str], remarks: list[str]) -> Iterator[Path]:
    """Yield the path of a table that `read_columns` can read: UTF-8 text with column names in line 1."""
    # A converted copy is made if needed: spreadsheets write other encodings, and lists written by hand have
    # no header line.
    if not FORMAT_BY_SUFFIX[path.suffix.lower()].is_text:
        yield path
        return
    text = _add_column_names(path, _decode_table(path, remarks), names)
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / path.name
        copied.write_text(text, encoding="utf-8", newline="")
        try:
            yield copied
        except DatasetError as error:
            # name the user's file, not the temporary copy
            raise DatasetError(str(error).replace(str(copied), str(path))) from None


def _decode_table(path: Path, remarks: list[str]) -> str:
    """Decode the text of a table file, guessing its encoding if it is not UTF-8."""
    content = read_content(path, MAX_METADATA_BYTES)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        guess = guess_windows_encoding(content) or guess_encoding(content)
        if guess is None:
            raise DatasetError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
        remarks.append(warning(f"{path.name}: not UTF-8, and read as {guess.name}"))
        return guess.text.removeprefix("\ufeff")


def _add_column_names(path: Path, text: str, names: Collection[str]) -> str:
    """Add a header line with column names to the text of a table that has none."""
    # `names` are the media files in the table's folder.
    if not FORMAT_BY_SUFFIX[path.suffix.lower()].has_header:
        return text
    first_line = text.split("\n", 1)[0]
    separator = next((sign for sign in "\t,;" if sign in first_line), ",")
    first_cell = first_line.split(separator)[0].strip(' "\r')
    if first_cell in names:
        return f"file_name{separator}text\n{text}"
    return text
