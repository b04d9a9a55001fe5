"""Lists with a JSON object on each line: the path of an image or clip, its caption, its companions.

Tables of a dataset may be in this format too.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset.forms.contract import DataForm, LookedAt, TableRow
from dataset.table import DatasetTable

if TYPE_CHECKING:  # torch is not loaded to read a dataset file
    from dataset.sources.media_source import Fault, MediaSource

logger = logging.getLogger(__name__)


def find_conflict(fields: Mapping[str, Any]) -> str | None:
    if fields["mask_directory"]:
        return "mask_directory cannot be used here; give mask_path in the lines of the list"
    return None


def complete(fields: dict[str, Any], where: str) -> None:
    if fields["control_directory"]:
        logger.warning(
            "%s: control_directory is ignored because a list itself names control files (control_path)", where
        )
        fields["control_directory"] = None


def list_sources(table: DatasetTable, faults: "list[Fault]") -> "list[MediaSource]":
    from dataset.forms.jsonl_rows import list_lines  # it loads what decodes

    return list_lines(table, faults)


def look_at(table: DatasetTable) -> LookedAt:
    from dataset.forms.jsonl_rows import look_at_lines

    return look_at_lines(table)


def column_names(path: Path) -> tuple[str, ...]:
    from dataset.forms.jsonl_rows import first_keys

    return first_keys(path)


def read_rows(path: Path, names: Collection[str] | None) -> Iterator[TableRow]:
    from dataset.forms.jsonl_rows import read_jsonl

    return read_jsonl(path, names)


JSONL = DataForm(
    "JSONL",
    source="jsonl_file",
    shared_keys=(
        "control_column",
        "allow_urls",
        "download_directory",
        "control_directory",
        "mask_directory",
        "multiple_target",
    ),
    find_conflict=find_conflict,
    complete=complete,
    list_sources=list_sources,
    caption_place=lambda table: 'no "caption" in its line',
    look_at=look_at,
    is_listed_in_training=True,
    suffixes=(".jsonl", ".ndjson"),
    column_names=column_names,
    read_rows=read_rows,
)
