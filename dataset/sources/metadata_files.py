"""List the pictures that a metadata JSON of image trainers names, with their captions and tags.

    {"cat.png": {"caption": "a cat", "tags": "red, chair"}, "sub/dog": {"tags": "dog"}}

A key is a path, or a name in the table's folder of pictures, with or without its suffix.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.sources.captions import captions_in, lines_of, not_utf8
from dataset.sources.faults import Fault
from dataset.sources.media_source import MediaSource
from dataset.sources.stems import unique_stems
from dataset.table import DatasetTable
from modules.errors import DatasetError
from modules.media.reading import image_suffixes
from modules.paths import check_length
from modules.text_files import bad_character, parse_json, read_text

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 30  # of a file: some million pictures
SIZE_KEY = "train_resolution"  # written by the preparing scripts of image trainers


def list_metadata(table: DatasetTable, faults: list[Fault]) -> list[MediaSource]:
    """Return a source for each picture of a table's metadata_file.

    Raises DatasetError if the file cannot be read. Faults of single entries are added to `faults`.
    """
    path = table.metadata_file
    assert path is not None
    content = _read_metadata_file(table, path)
    pictures = _Pictures(table.image_folder)
    found: list[tuple[Path, str | None]] = []
    for key, entry in content.items():
        try:
            picture = pictures.find(key)
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


def _read_metadata_file(table: DatasetTable, path: Path) -> Mapping[str, Any]:
    try:
        content = parse_json(read_text(path, MOST_BYTES))
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
    return content


@dataclass
class _Pictures:
    """Finds pictures by the keys of a metadata file; each folder is listed once."""

    folder: Path | None
    _listed: dict[Path, dict[str, Path]] = field(default_factory=dict)  # by name without suffix

    def find(self, key: str) -> Path:
        """Return the picture of a key. Raises ValueError if there is none."""
        if bad_character(key) or not key.strip():
            raise ValueError("this is not a path")
        there = Path(key) if self.folder is None else self.folder / key
        check_length(there)
        if there.suffix.lower() in image_suffixes() and there.is_file():
            return there
        found = self._stems(there.parent).get(there.name)
        if found is None:
            raise ValueError(f"there is no such picture{'' if self.folder is None else f' in {self.folder}'}")
        return found

    def _stems(self, folder: Path) -> Mapping[str, Path]:
        if folder not in self._listed:
            entries = sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []
            pictures = [path for path in entries if path.suffix.lower() in image_suffixes()]
            self._listed[folder] = {path.stem: path for path in pictures}
        return self._listed[folder]


def _caption(entry: Any, table: DatasetTable) -> str | None:
    """Return the text of an entry: its caption, then its tags; with wildcards the tags end every line.

    Raises ValueError if a value is not a text.
    """
    if not isinstance(entry, dict):
        raise ValueError("its value is not an object with caption or tags")
    caption, tags = (_text(entry, name) for name in ("caption", "tags"))
    separator = table.changes.separator
    if caption and tags:
        tags = separator.join(lines_of(tags)) if table.changes.wildcards else tags
        lines = lines_of(caption) if table.changes.wildcards else [caption]
        return "\n".join(f"{line}{separator} {tags}" for line in lines)
    return caption or tags or table.class_tokens


def _text(entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or bad_character(value):
        raise ValueError(f"{name} is not a text")
    return value.strip()
