"""Find columns of lists and tables that nothing reads, although their values or names suggest files."""

import difflib
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataset.forms.composing import KEYS, get_source_format
from dataset.forms.contract import InspectedColumns, TableRow
from dataset.forms.row_formats import find_cells
from dataset.forms.rows import CAPTION_COLUMNS, control_number, is_companion, is_control, is_layer
from dataset.sources.media_source import Fault
from dataset.table import FURTHER_TEXT, DatasetTable
from dataset.timestep_keys import TIMESTEP_KEYS
from modules.control_codes import shorten
from modules.media.decoding import ANIMATION_SUFFIXES
from modules.media.opening import AUDIO_SUFFIXES
from modules.media.reading import VIDEO_SUFFIXES, image_suffixes
from modules.paths import expand_path, hide_secrets, path_exists

MAX_ROWS = 1000  # maximum number of rows that are checked
MAX_SHOWN = 80  # characters of a value in a message
NEAR = 0.84  # similarity of names, 0..1: contol_path is near control_path, caption_en is not near caption
# columns that are read only for models whose tables have `reads_row_references`
ROW_REFERENCE_COLUMNS = frozenset({"references", FURTHER_TEXT.key})
# Reelsmith column -> its contents, for messages, and words in other programs' names of such columns
COLUMN_SYNONYMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "control_path": (
        "reference images and control media are",
        ("control", "controls", "edit", "reference", "references", "ref", "source", "src", "input", "kontext")
        + ("conditioning", "condition", "before"),
    ),
    "mask_path": ("masks are", ("mask", "masks", "matte", "segmentation")),
    "audio_path": ("the audio of clips is", ("audio", "sound", "speech", "music")),
}

IS_TABLE_KEY = ": it is a key of the [[datasets]] table, for all its items"

_QUOTED = re.compile(r"""["']([^"']+)["']""")


def find_unused(table: DatasetTable) -> list[Fault]:
    """Return a warning for each unread column that contains files, or is named almost like a column in use.

    1. Report columns whose cells contain files, except control columns.
    2. Report control columns of rows with more control images than the model takes.
    3. Report other columns whose names or values suggest that they are meant to be read.

    At most MAX_ROWS rows are checked.

    Raises:
        DatasetError: If the table cannot be listed.
    """
    path = table.source.path
    source_format = get_source_format(table)
    if not source_format.has_columns or not path.exists():  # reported by the listing
        return []
    columns = source_format.inspect_columns(table)
    # control columns are unused only in rows that have more control images than the model takes
    control_columns = [name for name in columns.unread_file_columns if is_control(table, name)]
    explanations: dict[str, str] = {}  # end of the warning about a column, by name
    for name in columns.unread_file_columns:
        if name not in control_columns:
            explanations[name] = f", which contains files{_make_hint(name, table) or ''}"
    cell_finders = {name: find_cells(path, name, finds_nulls=True) for name in control_columns}
    for row in itertools.islice(columns.rows, MAX_ROWS):
        # `_list_surplus` needs to know only which control columns have a file in this row
        control_cells = {
            name: True
            for name, find_cell in cell_finders.items()
            if find_cell is not None and find_cell(row) is not None
        }
        values = {**control_cells, **row.values}
        for name in _list_surplus(values, table):
            explanations[name] = (
                f": the model uses {table.references.control_count} of these files for each item"
            )
        for name, value in row.values.items():
            if name not in explanations and not _is_read(name, table, columns):
                explanation = _explain_unused(name, value, row, table, columns)
                if explanation is not None:
                    explanations[name] = explanation
    return _as_faults(path, explanations)


def _is_read(name: str, table: DatasetTable, columns: InspectedColumns) -> bool:
    """Return whether a column is read: a known one, or one of numbered companion files or layers."""
    return name in columns.columns_read or is_companion(name) or is_layer(table, name)


def _explain_unused(
    name: str, value: Any, row: TableRow, table: DatasetTable, columns: InspectedColumns
) -> str | None:
    """Return the end of a warning about an unread column with this value; None if it needs no warning."""
    lacks_caption = columns.is_list and not row.values.get("caption")
    explanation = _explain_by_name(name, value, table, lacks_caption)
    if explanation is None:
        media = row.values.get(columns.media_column)
        explanation = _explain_by_value(name, value, table=table, path=table.source.path, media=media)
    # other programs' tables have columns with names of keys, such as `resolution`; lists do not
    if explanation is None and columns.is_list and name in KEYS:
        explanation = IS_TABLE_KEY
    return explanation


def _explain_by_name(name: str, value: Any, table: DatasetTable, lacks_caption: bool) -> str | None:
    """Return the end of a warning about an unread column if its name suggests another use; otherwise None."""
    # `lacks_caption` says that the row of a list has no string in the column `caption`.
    if name in CAPTION_COLUMNS and value:
        if lacks_caption:
            return ": did you mean 'caption'?"
        return ": captions are read from another column"
    if name in TIMESTEP_KEYS:
        return IS_TABLE_KEY
    if name in ROW_REFERENCE_COLUMNS and not table.references.reads_row_references:
        return ": only models with references of several kinds read it, such as MiniMax-H3"
    return None


def _as_faults(path: Path, explanations: Mapping[str, str]) -> list[Fault]:
    """Return warnings about unread columns of a file; `explanations` is the end of each text, by column."""
    is_one = len(explanations) == 1
    kind = f"column of {path} is not read" if is_one else f"columns of {path} are not read"
    lines = [f"{name!r}{explanation}" for name, explanation in explanations.items()]
    return [Fault(kind, line if line.endswith("?") else f"{line}.") for line in lines]


def _list_surplus(values: Mapping[str, Any], table: DatasetTable) -> list[str]:
    """Return the control columns of a row that exceed the number of control images the model takes."""
    numbered = []  # number and column of each file
    for name, value in values.items():
        if not is_control(table, name) or not value:
            continue
        first = 0 if name == table.references.control_column else control_number(name) or 0
        count = 1
        if isinstance(value, list):
            count = sum(bool(path) for path in value)
        numbered += [(first + offset, name) for offset in range(count)]
    maximum = len(numbered) if table.references.control_count is None else table.references.control_count
    return [name for _, name in sorted(numbered)[maximum:]]


def _explain_by_value(name: str, value: Any, table: DatasetTable, path: Path, media: Any) -> str | None:
    """Return the end of a warning about an unread column if a value suggests a file; otherwise None."""
    # A column with a name similar to a column in use is reported, too.
    hint = _make_hint(name, table)
    texts = _texts_in(value)
    for text in texts[:4]:  # more would take long in tables with long lists
        if not isinstance(text, str) or not text.strip() or text == media or "\n" in text:
            continue
        suffix = Path(text.split("?")[0]).suffix.lower()
        is_media = suffix in image_suffixes() | VIDEO_SUFFIXES | ANIMATION_SUFFIXES | AUDIO_SUFFIXES
        if is_media and (hint is not None or _exists(text, path)):
            return f", such as {hide_secrets(shorten(text, MAX_SHOWN))!r}{hint or ''}"
    similar = _find_similar(name, table)
    return None if similar is None or not texts else f": did you mean {similar!r}?"


def _texts_in(value: Any) -> list[Any]:
    """Return the values to check for file names: the value itself, or the items of a list or object."""
    if isinstance(value, str):
        # a cell of a CSV table may contain a list as text
        return _QUOTED.findall(value) if value.lstrip().startswith("[") else [value]
    if isinstance(value, dict):
        return [*value.values()]
    return [*value] if isinstance(value, list) else []


def _exists(text: str, path: Path) -> bool:
    """Return whether a relative path exists in the working folder or in the folder of the list `path`."""
    try:
        return any(path_exists(expand_path(text, base)) for base in (None, path.parent))
    except ValueError:  # a name that no file can have
        return False


def _find_similar(name: str, table: DatasetTable) -> str | None:
    """Return the column in use with the most similar name; None if none is similar."""
    without_number = re.sub(r"_?\d+$", "", name.lower())
    used = [table.path_key, "caption", "control_path", "mask_path", "audio_path"]
    used += ["reference_path", "control_mask_path", "worse_path"]
    return next(iter(difflib.get_close_matches(without_number, used, 1, NEAR)), None)


def _make_hint(name: str, table: DatasetTable) -> str | None:
    """Return a hint for an unread column with a name similar to a column in use; None for others."""
    name_parts = set(re.split(r"[^a-z]+", name.lower()))
    similar = _find_similar(name, table)
    for column, (contents, synonyms) in COLUMN_SYNONYMS.items():
        if similar == column or (similar is None and name_parts.intersection(synonyms)):
            advice = f": {contents} read from {column}. Rename it"
            if column == "control_path":
                advice += f", or set control_column = {name!r} in the table"
            return advice
    return None
