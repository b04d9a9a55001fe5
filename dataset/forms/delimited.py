"""Tables as text, a row on each line: cells between commas or semicolons (CSV) or tabs (TSV)."""

from collections.abc import Collection, Iterator
from pathlib import Path

from dataset.forms.contract import DataForm, TableRow


def column_names(path: Path) -> tuple[str, ...]:
    from dataset.forms.delimited_rows import header_of  # it loads what decodes

    return header_of(path)


def read_rows(path: Path, names: Collection[str] | None) -> Iterator[TableRow]:
    from dataset.forms.delimited_rows import read_delimited

    return read_delimited(path, names)


DELIMITED = DataForm(
    "delimited",
    suffixes=(".csv", ".tsv", ".tab"),
    column_names=column_names,
    read_rows=read_rows,
    has_header=True,
)
