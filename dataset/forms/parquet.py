"""Tables in Parquet: a file, or a folder of parts. Columns may contain whole images and clips."""

from collections.abc import Collection, Iterator
from pathlib import Path

from dataset.forms.contract import FindCell, RowFormat, TableRow
from dataset.forms.parquet_parts import SUFFIXES


class Parquet(RowFormat):
    """Parquet format: one file, or a folder of files that together form one table."""

    suffixes = SUFFIXES
    is_text = False

    def reads(self, path: Path) -> bool:
        """Return whether the path is a folder (of .parquet parts) or has the suffix of a Parquet file."""
        return path.is_dir() or super().reads(path)

    def list_names(self) -> list[str]:
        """Return what the format reads, for messages: its suffixes and folders of .parquet parts."""
        return [*self.suffixes, "a folder of .parquet parts"]

    def column_names(self, path: Path) -> tuple[str, ...]:
        """Return the column names from the schema of the Parquet parts."""
        from dataset.forms.parquet_rows import read_column_names  # pyarrow is an extra

        return read_column_names(path)

    def read_rows(self, path: Path, names: Collection[str] | None) -> Iterator[TableRow]:
        """Yield the rows of all parts, in the order of the parts' names."""
        from dataset.forms.parquet_rows import read_parts

        return read_parts(path, names)

    def find_cells(self, path: Path, name: str, finds_nulls: bool) -> FindCell | None:
        """Return a function that finds a column's files by row, without reading other columns."""
        from dataset.forms.parquet_files import make_cell_finder

        return make_cell_finder(path, name, finds_nulls)

    def plain_columns(self, path: Path, names: Collection[str]) -> tuple[list[str], list[str]]:
        """Split `names` into columns of plain values and columns of files."""
        from dataset.forms.parquet_rows import split_columns

        return split_columns(path, names)


PARQUET = Parquet()
