"""Lists with a JSON object on each line: the path of an image or clip, its caption, its companions.

Tables of a dataset may be in this format too.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dataset.forms.contract import InspectedColumns, RowFormat, SourceFormat, TableRow
from dataset.sources.media_source import Fault, MediaSource
from dataset.table import DatasetTable

logger = logging.getLogger(__name__)


class JsonLists(SourceFormat):
    """Source format of JSONL lists in this program's own layout."""

    name = "JSONL"
    source = "jsonl_file"
    shared_keys = (
        "control_column",
        "allow_urls",
        "download_directory",
        "control_directory",
        "mask_directory",
        "multiple_target",
    )
    has_columns = True
    is_listed_in_training = True
    has_dependent_keys = True

    def find_conflict(self, fields: Mapping[str, Any]) -> str | None:
        """Return why mask_directory is not allowed (list lines name masks themselves); None if unset."""
        if fields["mask_directory"]:
            return "mask_directory cannot be used here; set mask_path in the lines of the list"
        return None

    def complete(self, fields: dict[str, Any], position: str) -> None:
        """Drop `control_directory` with a warning: the lines of a list name control files themselves."""
        if fields["control_directory"]:
            logger.warning(
                "%s: control_directory is ignored because a list itself names control files (control_path)",
                position,
            )
            fields["control_directory"] = None

    def list_sources(self, table: DatasetTable, faults: list[Fault]) -> list[MediaSource]:
        """Return the media files that the lines of the JSONL list name."""
        from dataset.forms.jsonl_rows import list_lines  # it loads decoders

        return list_lines(table, faults)

    def inspect_columns(self, table: DatasetTable) -> InspectedColumns:
        """Return the rows of the list and the names of the keys that are read from them."""
        from dataset.forms.jsonl_rows import inspect_lines

        return inspect_lines(table)

    def describe_caption_place(self, table: DatasetTable) -> str:
        """Return where a missing caption would be: in the line of the list."""
        return 'no "caption" in its line'


class JsonLines(RowFormat):
    """JSON Lines format: one JSON object in each line."""

    suffixes = (".jsonl", ".ndjson")

    def column_names(self, path: Path) -> tuple[str, ...]:
        """Return the keys of the JSON objects in the first lines."""
        from dataset.forms.jsonl_rows import first_keys

        return first_keys(path)

    def read_rows(self, path: Path, names: Collection[str] | None) -> Iterator[TableRow]:
        """Yield the JSON object in each line."""
        from dataset.forms.jsonl_rows import read_jsonl

        return read_jsonl(path, names)


JSONL = JsonLists()
JSON_LINES = JsonLines()
