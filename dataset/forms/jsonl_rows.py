"""Read JSONL files row by row, and list the sources that their rows name."""

import itertools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dataset.forms.columns import table_lines
from dataset.forms.contract import InspectedColumns, TableRow
from dataset.forms.rows import RowReader, find_base, list_rows, names_read, require_file
from dataset.sources.media_source import Fault, MediaSource
from dataset.table import DatasetTable
from modules.command import quote_command
from modules.errors import DatasetError
from modules.text_files import parse_json

FIRST_LINES = 100  # number of lines whose keys are the columns


def list_lines(table: DatasetTable, faults: list[Fault]) -> list[MediaSource]:
    """Return the media files in the lines of a JSONL list; errors, with line numbers, go to `faults`.

    The order is arbitrary.

    Raises:
        DatasetError: If the file cannot be read.
    """
    path = require_file(table)
    name = table.path_key
    example = f'{{"{name}": "...", "caption": "..."}}'
    base = find_base(path, name, read_jsonl(path, [name]))
    reader = RowReader(table, path, name, is_list=True, base=base)
    return list_rows(reader, read_jsonl(path, None, example), faults)


def inspect_lines(table: DatasetTable) -> InspectedColumns:
    """Return the rows of a list, and the names of the keys that are read from them."""
    media = table.path_key
    read = names_read(table, media, "caption")
    rows = read_jsonl(table.source.path, None)
    return InspectedColumns(media, read, unread_file_columns=[], rows=rows, is_list=True)


def first_keys(path: Path) -> tuple[str, ...]:
    """Return the keys of the JSON objects in the first lines of a file.

    Raises:
        DatasetError: If the file cannot be read.
    """
    keys: dict[str, None] = {}
    for row in itertools.islice(read_jsonl(path, None), FIRST_LINES):
        keys |= dict.fromkeys(row.values)
    return tuple(keys)


def read_jsonl(path: Path, names: Collection[str] | None, example: str = "") -> Iterator[TableRow]:
    """Yield the rows of a JSONL file; empty lines are skipped, and invalid lines have a fault.

    Args:
        path: Path of the file, with any suffix.
        names: Keys to read; None for all.
        example: A valid line, shown in errors.

    Raises:
        DatasetError: If the file cannot be read or is not JSONL but an array, an object over several lines,
            or CSV.
    """
    hint = f". Each line is one object such as {example}" if example else ""
    is_first = True
    for number, line in enumerate(table_lines(path), 1):
        if not line.strip():
            continue
        fault = None
        line_object: Mapping[str, Any] = {}
        try:
            line_object = _parse_object(line)
        except ValueError as error:
            fault = f"{error}{hint}"
            if is_first:
                _reject_other_format(path, line)
        is_first = False
        keys = line_object if names is None else names
        values = {key: line_object[key] for key in keys if line_object.get(key) is not None}
        yield TableRow(path, "line", number, values, fault=fault)


def _parse_object(line: str) -> dict[str, Any]:
    """Parse a line of a JSONL file. Raises ValueError, with a hint, if it is not a JSON object."""
    try:
        record = parse_json(line, no_repeats=True)
    except ValueError as error:
        if line.rstrip().endswith("},"):
            raise ValueError("there is a comma after the object. Remove it") from None
        raise ValueError(f"invalid JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError("it is not an object of columns and values")
    return record


# program for `python -c` that writes a JSON array as JSON Lines
TO_LINES = (
    "import json, sys; [print(json.dumps(row)) for row in json.load(open(sys.argv[1], encoding='utf-8'))]"
)


def _reject_other_format(path: Path, line: str) -> None:
    """Raise DatasetError if the first line of a list shows that the file is not JSON Lines."""
    # `line` is not empty, and not a JSON object.
    text = line.strip()
    rule = "a list has one object on each line, with nothing around or between them (JSONL)"
    # "[" alone, or followed by an object
    is_array = text.startswith("[") and text[1:].strip()[:1] in {"", "{"}
    if is_array:
        output = quote_command([str(path.with_name(f"{path.stem}_lines.jsonl"))])
        remedy = f"{quote_command(['python', '-c', TO_LINES, str(path)])} > {output}"
        raise DatasetError(f"{path} is one JSON array; {rule}.\n  Convert it: {remedy}")
    # a line that ends in "}," is an object with a comma after it, which is reported as such
    continues = text.endswith(("{", "[", ":", ",")) and not text.endswith("},")
    if text.startswith("{") and continues:
        raise DatasetError(
            f"{path} has an object over several lines; {rule}. Write each object on one line, as json.dumps "
            "without indent does."
        )
    has_separator = any(separator in text for separator in ",\t;")
    if has_separator and not text.startswith(("{", "[")):
        raise DatasetError(
            f"{path} looks like a table with a header ({text[:60]!r}); {rule}. Name it .csv or .tsv, and "
            "pass it to image_table_file or video_table_file."
        )
