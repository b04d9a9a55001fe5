"""Tables in Parquet: a file, or a folder of parts. Columns may hold whole images and clips."""

from collections.abc import Collection, Iterator
from pathlib import Path

from dataset.forms.contract import DataForm, FindCell, TableRow


def column_names(path: Path) -> tuple[str, ...]:
    from dataset.forms.parquet_rows import columns_of_parts  # pyarrow is an extra

    return columns_of_parts(path)


def read_rows(path: Path, names: Collection[str] | None) -> Iterator[TableRow]:
    from dataset.forms.parquet_rows import read_parts

    return read_parts(path, names)


def find_cells(path: Path, name: str, finds_nulls: bool) -> FindCell | None:
    from dataset.forms.parquet_files import cells_of_parts

    return cells_of_parts(path, name, finds_nulls)


def plain_columns(path: Path, names: Collection[str]) -> tuple[list[str], list[str]]:
    from dataset.forms.parquet_rows import plain_columns_of

    return plain_columns_of(path, names)


PARQUET = DataForm(
    "Parquet",
    suffixes=(".parquet", ".pq"),
    folder_of_parts="a folder of .parquet parts",
    column_names=column_names,
    read_rows=read_rows,
    find_cells=find_cells,
    plain_columns=plain_columns,
    is_text=False,
)
