"""Tables as text, a row on each line: cells between commas or semicolons (CSV) or tabs (TSV)."""

from collections.abc import Collection, Iterator
from pathlib import Path

from dataset.forms.contract import RowFormat, TableRow


class Delimited(RowFormat):
    """CSV and TSV format."""

    suffixes = (".csv", ".tsv", ".tab")
    has_header = True

    def column_names(self, path: Path) -> tuple[str, ...]:
        """Return the column names from the first line."""
        from dataset.forms.delimited_rows import read_column_names  # it loads decoders

        return read_column_names(path)

    def read_rows(self, path: Path, names: Collection[str] | None) -> Iterator[TableRow]:
        """Yield the rows below the header line."""
        from dataset.forms.delimited_rows import read_delimited

        return read_delimited(path, names)


DELIMITED = Delimited()
