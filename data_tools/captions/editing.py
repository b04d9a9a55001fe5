"""Edit captions that are there: replace texts, put words in. The old ones are kept as .bak."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.captions.backups import keep_backup
from data_tools.captions.lists import rewrite_lines
from data_tools.captions.options import WordingOptions
from data_tools.captions.places import CaptionPlace, entry_name, find_places
from data_tools.captions.planning import read_made
from data_tools.captions.wording import reword, reword_lines
from dataset.config import DatasetConfig, DatasetTable
from modules.atomic_write import write_text
from modules.console import count_of, show_box
from modules.control_codes import escape_control_codes, shorten
from modules.errors import DatasetError
from modules.paths import hide_secrets
from modules.text_files import parse_json, read_lines

LISTED = 20
SHOWN = 160  # characters of a caption


@dataclass(frozen=True)
class Edit:
    """A caption and its new text."""

    file: Path  # where it stands
    name: str  # in the record of its folder
    media: str
    old: str
    new: str

    def __str__(self) -> str:
        old, new = (shorten(" / ".join(text.split("\n")), SHOWN) for text in (self.old, self.new))
        return f"{self.media}: {old!r} -> {new!r}"


def edit_captions(config: DatasetConfig, wording: WordingOptions, dry_run: bool) -> None:
    """Apply `wording` to all captions of a dataset; each file that changes is kept as .bak.

    dry_run: print the changes instead. A caption that would become empty stays as it is. Raises DatasetError
    if the dataset cannot be used, or at the end if captions would become empty.
    """
    places = find_places(config, texts=True).all
    made = read_made(places)
    edits = [*_edits_of_files(places, wording), *_edits_of_lists(config, wording)]
    emptied = [edit for edit in edits if not edit.new]
    edits = [edit for edit in edits if edit.new]
    if dry_run:
        lines = [f"{count_of(len(edits), 'caption')} would be changed. Nothing is written."]
        lines += [f"  {edit}" for edit in edits[:LISTED]]
        lines += [f"  ... and {len(edits) - LISTED} more"] if len(edits) > LISTED else []
        sys.stdout.write(escape_control_codes("\n".join(lines)) + "\n")
    else:
        for edit in edits:
            record = made[edit.file.parent]
            if record.has(edit.name, edit.old):  # it stays one of this program
                record.add(edit.name, edit.new)
        lists = {table.jsonl_file: table for table in config.datasets if table.jsonl_file is not None}
        for file in dict.fromkeys(edit.file for edit in edits if edit.file in lists):
            keep_backup(file)
            rewrite_lines(file, partial(_change_line, wording, lists[file]))
        for edit in edits:
            if edit.file not in lists:
                keep_backup(edit.file)
                write_text(edit.file, edit.new)
        rest = f"{len(places) - len(edits)} are as they were"
        show_box("Editing is finished", [("captions", f"{len(edits)} changed, {rest}")])
    if emptied:
        raise DatasetError(
            f"{count_of(len(emptied), 'caption')} would be empty and stay as they are, such as "
            f"{emptied[0].media}: {shorten(emptied[0].old, SHOWN)!r}. Write them by hand, or remove them and "
            "have new ones made."
        )


def _edits_of_files(places: Sequence[CaptionPlace], wording: WordingOptions) -> Iterator[Edit]:
    for place in places:
        if place.entry is not None or place.caption is None:
            continue
        new = reword_lines(place.caption, wording, place.source.table.multi_caption)
        if new != place.caption:
            yield Edit(place.file, place.name, str(place.source.path), place.caption, new)


def _edits_of_lists(config: DatasetConfig, wording: WordingOptions) -> Iterator[Edit]:
    """Yield the edits of all lists' lines, which have been read before, without faults."""
    tables = {table.jsonl_file: table for table in config.datasets if table.jsonl_file is not None}
    for file, table in tables.items():
        for line in read_lines(file):
            record = parse_json(line)
            changed = _reworded(wording, table, record)
            if changed:
                media = record[f"{table.kind}_path"]
                old, new = (
                    "\n".join(text for key in changed for text in _texts(values[key]))
                    for values in (record, changed)
                )
                is_emptied = any(not text for key in changed for text in _texts(changed[key]))
                name, shown = entry_name(file, media), hide_secrets(media)
                yield Edit(file, name, shown, old, "" if is_emptied else new)


def _change_line(wording: WordingOptions, table: DatasetTable, record: dict[str, Any]) -> dict[str, Any]:
    changed = _reworded(wording, table, record)
    return {} if any(not text for value in changed.values() for text in _texts(value)) else changed


def _reworded(wording: WordingOptions, table: DatasetTable, record: dict[str, Any]) -> dict[str, Any]:
    """Return the caption of a line, and with multi_caption its further ones, as far as they change."""
    new: dict[str, Any] = {}
    if isinstance(record.get("caption"), str):
        new["caption"] = reword(record["caption"], wording)
    if table.multi_caption and isinstance(record.get("captions"), list):
        new["captions"] = [reword(text, wording) for text in record["captions"]]
    return {key: value for key, value in new.items() if value != record[key]}


def _texts(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
