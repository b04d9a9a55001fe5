"""Find columns of lists and tables that nothing reads, though they hold files or are named as if they did."""

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataset.config import DatasetTable
from dataset.sources.columns import TableRow, column_names, plain_columns, read_columns, read_jsonl
from dataset.sources.media_source import Fault
from dataset.sources.rows import control_number
from dataset.sources.tables import CAPTION_COLUMNS, choose_columns, find_cells, names_read
from modules.control_codes import shorten
from modules.media.decoding import ANIMATION_SUFFIXES
from modules.media.opening import SOUND_SUFFIXES
from modules.media.reading import VIDEO_SUFFIXES, image_suffixes
from modules.paths import expand_path, hide_secrets, path_exists

LOOKED_AT = 1000  # rows of a file
MOST_SHOWN = 80  # characters of a value
NEAR = 0.84  # how alike names are, 0..1: contol_path is near control_path, caption_en not near caption
# our column name -> what it holds, and words in other programs' names of such columns
MEANT: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "control_path": (
        "reference pictures and control media are",
        ("control", "controls", "edit", "reference", "references", "ref", "source", "src", "input", "kontext")
        + ("conditioning", "condition", "before"),
    ),
    "mask_path": ("masks are", ("mask", "masks", "matte", "segmentation")),
    "audio_path": ("the sound of clips is", ("audio", "sound", "speech", "music")),
}

_QUOTED = re.compile(r"""["']([^"']+)["']""")


def find_unread(table: DatasetTable) -> list[Fault]:
    """Return a remark for each column that is not read, but holds files, or is named almost like one that is.

    Looks at LOOKED_AT rows at most. Raises DatasetError as listing the table does.
    """
    path = table.jsonl_file or table.table_file
    if path is None or not path.exists():  # reported by the listing
        return []
    found: dict[str, str] = {}  # text by column
    media_column, held, rows = _open(table, path)
    beside = [name for name in held if _place(name, table) is not None]
    found |= {name: f", which holds files{_hint(name, table) or ''}" for name in held if name not in beside}
    finders = {name: find_cells(path, name, finds_nulls=True) for name in beside}
    cells = {name: cell for name, cell in finders.items() if cell is not None}
    is_list = table.jsonl_file is not None
    read = names_read(table, media_column, "caption" if is_list else "")
    for row in itertools.islice(rows, LOOKED_AT):
        values = row.values
        filled = {name: True for name, cell in cells.items() if cell(row) is not None}
        for name in _beyond({**filled, **values}, table):
            found[name] = f": of such files the model takes {table.control_count} an item"
        for name, value in values.items():
            if name in read or name in found or _is_beside(name):
                continue
            if name in CAPTION_COLUMNS and value:
                is_meant = is_list and not values.get("caption")
                found[name] = (
                    ": did you mean 'caption'?" if is_meant else ": captions are read from another column"
                )
            elif (text := _explain(name, value, table, path, values.get(media_column))) is not None:
                found[name] = text
    kind = f"column of {path} is not read" if len(found) == 1 else f"columns of {path} are not read"
    ends = {name: "" if text.endswith("?") else "." for name, text in found.items()}
    return [Fault(kind, f"{name!r}{text}{ends[name]}") for name, text in found.items()]


def _open(table: DatasetTable, path: Path) -> tuple[str, list[str], Iterator[TableRow]]:
    """Return the column of the media, the unread columns that hold whole files, and rows with the media,
    control and other unread columns.
    """
    if table.jsonl_file is not None:
        lines = read_jsonl(path, None)
        return table.path_key, [], lines
    columns = column_names(path)
    media, caption = choose_columns(table, columns)
    read = names_read(table, media, caption or "") - {media}
    control = [name for name in columns if _place(name, table) is not None]
    unread = [name for name in columns if name not in read and not _is_beside(name)]
    plain, held = plain_columns(path, [*unread, *control])
    rows = read_columns(path, plain)
    return media, [name for name in held if name != media], rows


def _is_beside(name: str) -> bool:
    return control_number(name) is not None or control_number(name, "reference_path") is not None


def _beyond(values: Mapping[str, Any], table: DatasetTable) -> list[str]:
    """Return the columns of a row with control media beyond those that the model takes."""
    numbered = [
        (first + place, name)
        for name, value in values.items()
        if (first := _place(name, table)) is not None and value
        for place in range(len([*filter(None, value)]) if isinstance(value, list) else 1)
    ]
    most = len(numbered) if table.control_count is None else table.control_count
    return [name for _, name in sorted(numbered)[most:]]


def _place(name: str, table: DatasetTable) -> int | None:
    return 0 if name == table.control_column else control_number(name)


def _explain(name: str, value: Any, table: DatasetTable, path: Path, media: Any) -> str | None:
    """Return a remark on a value, or None. media: the path that the same row reads."""
    hint = _hint(name, table)
    texts = [value] if isinstance(value, str) else [*value] if isinstance(value, list) else []
    texts = [*value.values()] if isinstance(value, dict) else texts
    if isinstance(value, str) and value.lstrip().startswith("["):  # a list in the cell of a table
        texts = _QUOTED.findall(value)
    for text in texts[:4]:
        if isinstance(text, str) and text.strip() and text != media and "\n" not in text:
            shown = f", such as {hide_secrets(shorten(text, MOST_SHOWN))!r}"
            suffix = Path(text.split("?")[0]).suffix.lower()
            is_media = suffix in image_suffixes() | VIDEO_SUFFIXES | ANIMATION_SUFFIXES | SOUND_SUFFIXES
            if is_media and (hint is not None or _exists(text, path)):
                return f"{shown}{hint or ''}"
    near = _near(name, table)
    return None if near is None or not texts else f": did you mean {near!r}?"


def _exists(text: str, path: Path) -> bool:
    try:
        return any(path_exists(expand_path(text, base)) for base in (None, path.parent))
    except ValueError:  # a name that no file can have
        return False


def _near(name: str, table: DatasetTable) -> str | None:
    bare = re.sub(r"_?\d+$", "", name.lower())
    known = [table.path_key, "caption", "control_path", "mask_path", "audio_path"]
    known += ["reference_path", "control_mask_path"]
    return next(iter(difflib.get_close_matches(bare, known, 1, NEAR)), None)


def _hint(name: str, table: DatasetTable) -> str | None:
    words = set(re.split(r"[^a-z]+", name.lower()))
    near = _near(name, table)
    for column, (what, meant) in MEANT.items():
        if near == column or (near is None and words.intersection(meant)):
            more = f", or say control_column = {name!r} in the table" if column == "control_path" else ""
            return f": {what} read from {column}. Rename it{more}"
    return None
