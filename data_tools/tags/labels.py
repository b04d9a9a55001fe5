"""The tags that a tagger knows, in the order of its outputs, with their categories."""

import csv
from dataclasses import dataclass
from pathlib import Path

from modules.control_codes import shorten
from modules.errors import CheckpointError
from modules.text_files import bad_character, parse_json, read_text

MODEL_FOLDER = Path("models/wd_tagger")  # that tools/download.py fills

TABLE_NAME, MAPPING_NAME = "selected_tags.csv", "tag_mapping.json"
RATING, GENERAL, CHARACTER, QUALITY = "rating", "general", "character", "quality"
# category numbers in the CSV table: Danbooru's, and 9, which the taggers' authors added
_BY_NUMBER = {
    "0": GENERAL,
    "1": "artist",
    "3": "copyright",
    "4": CHARACTER,
    "5": "meta",
    "9": RATING,
}
CATEGORIES = frozenset({*_BY_NUMBER.values(), "model", QUALITY})
_MAX_TAGS = 1_000_000


@dataclass(frozen=True)
class Label:
    """A tag that a tagger can predict, with its category from CATEGORIES."""

    name: str
    category: str


def read_labels(folder: Path) -> tuple[Label, ...]:
    """Read a tagger's labels from the CSV table in its folder, or from the JSON mapping if there is none.

    Raises:
        CheckpointError: If the folder has neither, or if a line cannot be used.
    """
    for name, parse_labels in ((TABLE_NAME, _read_table), (MAPPING_NAME, _read_mapping)):
        path = folder / name
        if not path.is_file():
            continue
        try:
            labels = parse_labels(read_text(path))
        except (OSError, ValueError, csv.Error) as error:
            reason = shorten(str(error), 300)
            raise CheckpointError(f"{path} is not a list of tags: {reason}", path) from None
        if not labels:
            raise CheckpointError(f"{path} has no tags", path)
        return labels
    raise CheckpointError(
        f"{folder} has no {TABLE_NAME} and no {MAPPING_NAME}: a tagger comes with one", folder
    )


def has_mapping(folder: Path) -> bool:
    """Return whether the labels are a JSON mapping; such taggers scale inputs and outputs differently."""
    return not (folder / TABLE_NAME).is_file()


def _read_table(text: str) -> tuple[Label, ...]:
    """Read tags from CSV, `tag_id,name,category,count`. Raises ValueError if a row is malformed."""
    labels = []
    rows = csv.DictReader(text.splitlines())
    if not {"name", "category"} <= {*(rows.fieldnames or ())}:
        raise ValueError("its first line has to name the columns tag_id,name,category,count")
    for row in rows:
        name, number = row["name"], row["category"]
        if number not in _BY_NUMBER:
            raise ValueError(f"line {rows.line_num}: category {number} is unknown")
        labels.append(_make_label(name, _BY_NUMBER[number]))
    return tuple(labels)


def _read_mapping(text: str) -> tuple[Label, ...]:
    """Read tags from JSON: {index: {"tag": ..., "category": ...}}. Raises ValueError if malformed."""
    content = parse_json(text, no_repeats=True)
    if not isinstance(content, dict) or len(content) > _MAX_TAGS:
        raise ValueError("it must be an object of numbers and tags")
    labels = []
    # indices are positions in the tagger's output, so none may be missing
    for index in range(len(content)):
        entry = content.get(str(index))
        if not isinstance(entry, dict):
            raise ValueError(f"there is no tag with index {index}, but {len(content)} tags")
        category = str(entry.get("category")).lower()
        if category not in CATEGORIES:
            raise ValueError(f"tag {index}: category {category} is unknown")
        labels.append(_make_label(entry.get("tag"), category))
    return tuple(labels)


def _make_label(name: object, category: str) -> Label:
    """Return a tag's label. Raises ValueError if the tag cannot be written in a caption."""
    if not isinstance(name, str) or not name.strip() or bad_character(name) or len(name.splitlines()) > 1:
        raise ValueError(f"{name!r} is not a tag")
    return Label(name, category)
