"""The files of a Parquet table: one, or the parts in a folder. Standard library only."""

from pathlib import Path

from modules.errors import DatasetError

SUFFIXES = (".parquet", ".pq")


def parquet_parts(path: Path) -> list[Path]:
    """Return the Parquet file itself, or those in a folder, sorted by name.

    Raises:
        DatasetError: If a folder contains none.
    """
    if not path.is_dir():
        return [path]
    parts = sorted(
        part
        for part in path.iterdir()
        if part.suffix.lower() in SUFFIXES and not part.name.startswith((".", "_"))
    )
    if not parts:
        raise DatasetError(
            f"{path} is a folder without .parquet files. Name a .parquet, .csv, .tsv or .jsonl file, or a "
            "folder of .parquet parts."
        )
    return parts
