"""Find columns of lists and tables that nothing reads, though they hold files or are named as if they did."""

import difflib
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataset.forms.composing import KEYS, find_cells, form_of
from dataset.forms.rows import CAPTION_COLUMNS, control_number, is_companion, is_control, is_layer
from dataset.sources.media_source import Fault
from dataset.table import FURTHER_TEXT, DatasetTable
from dataset.timestep_keys import TIMESTEP_KEYS
from modules.control_codes import shorten
from modules.media.decoding import ANIMATION_SUFFIXES
from modules.media.opening import AUDIO_SUFFIXES
from modules.media.reading import VIDEO_SUFFIXES, image_suffixes
from modules.paths import expand_path, hide_secrets, path_exists

LOOKED_AT = 1000  # rows of a file
MAX_SHOWN = 80  # characters of a value
NEAR = 0.84  # how alike names are, 0..1: contol_path is near control_path, caption_en not near caption
# of rows of models whose tables have `shows_media`
OF_SHOWN_MEDIA = frozenset({"references", FURTHER_TEXT.key})
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

OF_TABLE = ": it is a key of the [[datasets]] table, for all its items"

_QUOTED = re.compile(r"""["']([^"']+)["']""")


def find_unused(table: DatasetTable) -> list[Fault]:
    """Warn of each unused column that holds files, or whose name is similar to that of a used column.

    At most LOOKED_AT rows are checked. Raises DatasetError if the table cannot be listed.
    """
    path = table.source
    if not form_of(table).has_columns or not path.exists():  # reported by the listing
        return []
    columns = form_of(table).look_at(table)
    companion_cells = [name for name in columns.cells if is_control(table, name)]
    unread: dict[str, str] = {}  # text by column
    for name in columns.cells:
        if name not in companion_cells:
            unread[name] = f", which holds files{_make_hint(name, table) or ''}"
    finders = {name: find_cells(path, name, finds_nulls=True) for name in companion_cells}
    for row in itertools.islice(columns.rows, LOOKED_AT):
        values: dict[str, Any] = {}
        for name, finder in finders.items():
            if finder is not None and finder(row) is not None:
                values[name] = True
        values |= row.values
        for name in _list_surplus(values, table):
            unread[name] = f": of such files the model takes {table.control_count} an item"
        for name, value in row.values.items():
            is_read = name in columns.read or is_companion(name) or is_layer(table, name)
            if is_read or name in unread:
                continue
            lacks_caption = columns.is_list and not row.values.get("caption")
            text = _explain_by_name(name, value, table, lacks_caption)
            if text is None:
                text = _explain(name, value, table=table, path=path, media=row.values.get(columns.media))
            # other programs' tables have columns with names of keys, such as `resolution`; lists do not
            if text is None and columns.is_list and name in KEYS:
                text = OF_TABLE
            if text is not None:
                unread[name] = text
    return _as_errors(path, unread)


def _explain_by_name(name: str, value: Any, table: DatasetTable, lacks_caption: bool) -> str | None:
    """Return a warning about an unused column whose name has a meaning elsewhere, or None.

    `lacks_caption` says that the row of a list has no text in the column `caption`.
    """
    if name in CAPTION_COLUMNS and value:
        if lacks_caption:
            return ": did you mean 'caption'?"
        return ": captions are read from another column"
    if name in TIMESTEP_KEYS:
        return OF_TABLE
    if name in OF_SHOWN_MEDIA and not table.shows_media:
        return ": models with references of several kinds read it, such as MiniMax-H3"
    return None


def _as_errors(path: Path, unread: Mapping[str, str]) -> list[Fault]:
    """Return the faults of a file.

    `unread` are the text by column.
    """
    kind = f"column of {path} is not read" if len(unread) == 1 else f"columns of {path} are not read"
    lines = [f"{name!r}{text}" for name, text in unread.items()]
    return [Fault(kind, line if line.endswith("?") else f"{line}.") for line in lines]


def _list_surplus(values: Mapping[str, Any], table: DatasetTable) -> list[str]:
    """Return the columns of a row with control media beyond those that the model takes."""
    numbered = []
    for name, value in values.items():
        if not is_control(table, name) or not value:
            continue
        first = 0 if name == table.control_column else control_number(name) or 0
        count = len([*filter(None, value)]) if isinstance(value, list) else 1
        numbered += [(first + place, name) for place in range(count)]
    maximum = len(numbered) if table.control_count is None else table.control_count
    return [name for _, name in sorted(numbered)[maximum:]]


def _explain(name: str, value: Any, table: DatasetTable, path: Path, media: Any) -> str | None:
    """Return a warning about a value of an unused column, or None.

    `media` is the path of the media in the same row.
    """
    hint = _make_hint(name, table)
    texts = _texts_in(value)
    for text in texts[:4]:
        if not isinstance(text, str) or not text.strip() or text == media or "\n" in text:
            continue
        suffix = Path(text.split("?")[0]).suffix.lower()
        is_media = suffix in image_suffixes() | VIDEO_SUFFIXES | ANIMATION_SUFFIXES | AUDIO_SUFFIXES
        if is_media and (hint is not None or _exists(text, path)):
            return f", such as {hide_secrets(shorten(text, MAX_SHOWN))!r}{hint or ''}"
    similar = _find_similar(name, table)
    return None if similar is None or not texts else f": did you mean {similar!r}?"


def _texts_in(value: Any) -> list[Any]:
    """Return the texts of a value: itself, those in a list, or in a list in the cell of a table."""
    if isinstance(value, str):
        return _QUOTED.findall(value) if value.lstrip().startswith("[") else [value]
    if isinstance(value, dict):
        return [*value.values()]
    return [*value] if isinstance(value, list) else []


def _exists(text: str, path: Path) -> bool:
    try:
        return any(path_exists(expand_path(text, base)) for base in (None, path.parent))
    except ValueError:  # a name that no file can have
        return False


def _find_similar(name: str, table: DatasetTable) -> str | None:
    """Return the column of ours that a name is almost equal to."""
    bare = re.sub(r"_?\d+$", "", name.lower())
    ours = [table.path_key, "caption", "control_path", "mask_path", "audio_path"]
    ours += ["reference_path", "control_mask_path", "worse_path"]
    return next(iter(difflib.get_close_matches(bare, ours, 1, NEAR)), None)


def _make_hint(name: str, table: DatasetTable) -> str | None:
    """Return advice for a column whose name equals, or is a synonym of, that of a known column."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    similar = _find_similar(name, table)
    for column, (contents, synonyms) in MEANT.items():
        if similar == column or (similar is None and words.intersection(synonyms)):
            advice = f": {contents} read from {column}. Rename it"
            if column == "control_path":
                advice += f", or say control_column = {name!r} in the table"
            return advice
    return None
