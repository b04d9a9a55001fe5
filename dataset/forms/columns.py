"""What all formats of tables need: the lines of a file, and a check of column names."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataset.sources.captions import not_utf8
from modules.errors import DatasetError
from modules.limits import MAX_COLUMNS
from modules.text_files import read_lines


def table_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file without line ends.

    Raises:
        DatasetError: If the file cannot be read, or is not UTF-8.
    """
    number = 0  # number of the last readable line, for the error
    try:
        for number, line in enumerate(read_lines(path), 1):  # noqa: B007
            yield line
    except UnicodeDecodeError:
        raise not_utf8(path, number) from None
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}. Correct the path.") from error


def check_names(path: Path, names: Sequence[str]) -> None:
    """Check the column names of a table.

    Raises:
        DatasetError: If there are too many columns, or if a name occurs twice.
    """
    if len(names) > MAX_COLUMNS:
        raise DatasetError(f"{path} has {len(names):,} columns, but at most {MAX_COLUMNS:,} are read")
    twice = next((name for name, count in Counter(names).items() if count > 1 and name), None)
    if twice is not None:
        raise DatasetError(f"{path}: the column {twice!r} occurs twice; rename one of them")
