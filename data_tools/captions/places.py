"""Where the captions of a dataset stand, or would: files beside the media, or lines of a JSONL list."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.captions.lists import line_key
from dataset.config import DatasetConfig, DatasetTable
from dataset.sources.captions import read_caption
from dataset.sources.listing import find_all_sources
from dataset.sources.media_source import MediaSource
from dataset.sources.rows import RowReader
from modules.errors import DatasetError
from modules.paths import expand_path, is_address
from modules.text_files import parse_json, read_lines

EXTENSION = ".txt"  # of tables that name none


@dataclass(frozen=True)
class CaptionPlace:
    """Where the caption of a source stands, or would."""

    source: MediaSource
    file: Path  # a text file, or the list
    entry: str | None  # the path in the line of the list; None: the file has nothing but this caption
    caption: str | None  # as it stands there; None: missing, or in a file and not read
    has_caption: bool

    @property
    def name(self) -> str:
        """Return the caption's name in the record of its folder."""
        return self.file.name if self.entry is None else entry_name(self.file, self.entry)

    def __str__(self) -> str:
        return str(self.file) if self.entry is None else f"a line of {self.file}"


def entry_name(file: Path, entry: str) -> str:
    """Return the name of a list's line in the record of its folder. entry: the path in the line."""
    return f"{file.name}: {line_key(entry)}"


@dataclass(frozen=True)
class CaptionPlaces:
    """The captions of a dataset, each once, and which tables lack a key to find them."""

    all: tuple[CaptionPlace, ...]
    without_extension: tuple[DatasetTable, ...]

    def say_missing_keys(self) -> list[str]:
        """Return a text for each table that needs a key for the place of its captions."""
        return [
            f"{table.name} has no caption_extension, so its captions are {EXTENSION} files beside its "
            f"{table.kind}s. "
            f'For caching, add this line to the table (or to [general]): caption_extension = "{EXTENSION}"'
            for table in self.without_extension
        ]


def find_places(config: DatasetConfig, texts: bool) -> CaptionPlaces:
    """Return where the captions of all sources stand. texts: also read those in files beside the media.

    Sources are listed as for caching, but for control media and masks. A caption that several tables share is
    one place. Raises DatasetError if the dataset cannot be used, or has tables whose captions cannot be
    written.
    """
    _refuse_other_kinds(config.datasets)
    lacking = tuple(table for table in config.datasets if table.directory and not table.caption_extension)
    tables = tuple(map(_media_only, config.datasets))
    sources = find_all_sources(dataclasses.replace(config, datasets=tables))
    lines = {table.jsonl_file: _read_list(table) for table in tables if table.jsonl_file is not None}
    places: dict[tuple[Path, str | None], CaptionPlace] = {}
    for source in sources:
        place = _place_of(source, lines, texts)
        places.setdefault((place.file, place.entry), place)
    return CaptionPlaces(tuple(places.values()), lacking)


def has_place(table: DatasetTable) -> bool:
    """Return whether captions of a table can be written."""
    return table.directory is not None or table.jsonl_file is not None


def _refuse_other_kinds(tables: Sequence[DatasetTable]) -> None:
    others = [table.name for table in tables if not has_place(table)]
    if others:
        raise DatasetError(
            f"{', '.join(others)}: captions are written beside the files of a folder, or into a JSONL list, "
            "and this table is neither. Use a configuration with video_directory, image_directory, "
            "video_jsonl_file or image_jsonl_file over the same media."
        )


def _media_only(table: DatasetTable) -> DatasetTable:
    """Return a copy of a table with only the media and their captions."""
    extension = table.caption_extension or EXTENSION
    return dataclasses.replace(
        table,
        caption_extension=extension,
        control_directory=None,
        mask_directory=None,
        class_tokens=None,
    )


def _place_of(
    source: MediaSource, lines: Mapping[Path, Mapping[Path, tuple[str, str | None]]], texts: bool
) -> CaptionPlace:
    has_caption, path = source.caption is not None, source.caption_path
    if path is not None:
        return CaptionPlace(
            source, path, None, read_caption(path) if texts and has_caption else None, has_caption
        )
    file = source.table.jsonl_file
    assert file is not None
    try:
        entry, caption = lines[file][source.path]
    except KeyError:
        raise DatasetError(f"{file}: the line of {source.path} cannot be found again. Run again.") from None
    return CaptionPlace(source, file, entry, caption, has_caption)


def _read_list(table: DatasetTable) -> dict[Path, tuple[str, str | None]]:
    """Return the path, as it stands in the list, and the caption of each line by its source's path.

    The list has been read before, without faults.
    """
    assert table.jsonl_file is not None
    key = f"{table.kind}_path"
    found: dict[Path, tuple[str, str | None]] = {}
    rows = RowReader(table, table.jsonl_file, key, is_list=True)
    for number, line in enumerate(read_lines(table.jsonl_file), 1):
        record = parse_json(line)
        entry = record[key]
        if is_address(entry):  # `rows` would do for paths too, but takes several times as long
            source = rows.read(record, f"{table.jsonl_file}, line {number}")
            path = None if source is None else source.path
        else:
            path = expand_path(entry)
        if path is not None:
            found[path] = (entry, record.get("caption"))
    return found
