"""Base classes of data forms: where the items of a table are, how rows are written, how caches are stored.

Each form is a file that imports quickly, in some cases with a second file that loads heavy libraries, and its
lines in `dataset/forms/__init__.py` or `row_formats.py`. All other code works unchanged if these are deleted.
Only folders and JSONL lists are named elsewhere; other forms are found by the keys of a table
(`SourceFormat`), the suffix of a file (`RowFormat`) or the value of `cache_format` (`SharedCaches`), see
`composing.py` and `row_formats.py`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from dataset.sources.media_source import Fault, MediaSource, PackedFile
from dataset.table import DatasetTable, FormatKeys

if TYPE_CHECKING:  # torch is not loaded to read a dataset file
    from dataset.cache_files import CacheStore, NpzNames


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a list or table file."""

    file: Path  # if there are several parts, the part with this row
    unit: str  # what `number` counts: "line", or "row" in Parquet
    # from 1, and the header of a CSV file counts; for a CSV row over several lines, the first line
    number: int
    values: Mapping[str, Any] = field(default_factory=dict)  # values that are not null, by column
    fault: str | None = None  # why the row has no values: "it has 3 cells, the header has 2"

    @property
    def position(self) -> str:
        """The row's position for messages: `data.csv, line 3`."""
        return f"{self.file}, {self.unit} {self.number}"


ListImages = Callable[[], Mapping[str, Path]]  # returns paths of images without suffix, by stem
FindCell = Callable[[TableRow], "PackedFile | None"]  # returns the file in a cell of a row; None: no file


class InspectedColumns(NamedTuple):
    """The columns of a list or table that were looked at, to warn about columns that nothing reads."""

    media_column: str
    columns_read: set[str]  # except numbered ones such as `control_path_1`
    unread_file_columns: list[str]  # unread columns that contain files
    rows: Iterator[TableRow]  # rows with the media, control and unread columns
    is_list: bool = False  # whether this is a JSONL list, which is written for this program


class SourceFormat:
    """Where a table's items come from: a folder, a list, a table file or tars."""

    name: ClassVar[str]  # name for messages
    # the key that says where the items are: in full, or without the `image_` or `video_` before it
    source: ClassVar[str] = ""
    keys: ClassVar[type[FormatKeys] | None] = None  # record of the keys that only tables of this form have
    shared_keys: ClassVar[tuple[str, ...]] = ()  # keys of some forms that tables of this form have, too
    metadata_key: ClassVar[str] = ""  # key of the source in a subset's metadata, instead of class and repeats
    empty: ClassVar[str] = "has no lines"  # follows the name of an empty source in messages
    has_columns: ClassVar[bool] = False  # whether `inspect_columns` is defined
    # whether training may list the sources to compare their companions with those in the caches
    is_listed_in_training: ClassVar[bool] = False
    # whether other programs store caches next to the images
    shares_caches_with_other_programs: ClassVar[bool] = False
    names_images_anywhere: ClassVar[bool] = False  # whether images of one table may be in many folders
    has_dependent_keys: ClassVar[bool] = False  # whether `find_conflict` or `complete` is defined

    def find_conflict(self, fields: Mapping[str, Any]) -> str | None:
        """Return an error about a table whose keys contradict each other; None if there is none."""
        return None

    def complete(self, fields: dict[str, Any], position: str) -> None:
        """Set fields that depend on others, with warnings; `position` names the table in messages."""

    def list_sources(self, table: DatasetTable, faults: list[Fault]) -> list[MediaSource]:
        """Return a table's media files; errors about single items are added to `faults`.

        Raises:
            DatasetError: If the folder, list or table cannot be read.
        """
        raise NotImplementedError(self.name)  # not called for folders, see dataset/listing.py

    def describe_caption_place(self, table: DatasetTable) -> str:
        """Return where a missing caption was looked for, as text for an error message."""
        return "no caption_extension in its table, such as .txt"

    def inspect_columns(self, table: DatasetTable) -> InspectedColumns:
        """Return the columns of a list or table, for warnings about unread ones."""
        raise NotImplementedError(self.name)

    def list_addresses(self, table: DatasetTable) -> list[str]:
        """Return the URLs that must be downloaded before a table's media files can be listed."""
        return []


class RowFormat:
    """File format for the rows of a list or table, such as JSONL or CSV; subclasses implement the reading."""

    suffixes: ClassVar[tuple[str, ...]]  # suffixes of its files
    is_text: ClassVar[bool] = True  # whether its files are text, which can be corrected in an editor
    has_header: ClassVar[bool] = False  # whether the first line names the columns

    def reads(self, path: Path) -> bool:
        """Return whether a path is in this format, judged by its suffix; by default, folders are not."""
        return path.suffix.lower() in self.suffixes and not path.is_dir()

    def list_names(self) -> list[str]:
        """Return the kinds of files that this format reads, for messages."""
        return [*self.suffixes]

    def column_names(self, path: Path) -> tuple[str, ...]:
        """Return the column names of a list or table file.

        Raises:
            DatasetError: If the file cannot be read or has no columns.
        """
        raise NotImplementedError

    def read_rows(self, path: Path, names: Collection[str] | None) -> Iterator[TableRow]:
        """Yield the rows with the columns `names` (None: all). Unreadable rows have a fault."""
        raise NotImplementedError

    def find_cells(self, path: Path, name: str, finds_nulls: bool) -> FindCell | None:
        """Return a function that finds the file of a row in this column; None if it contains no files.

        With `finds_nulls`, the function returns None for a null cell.
        """
        return None

    def plain_columns(self, path: Path, names: Collection[str]) -> tuple[list[str], list[str]]:
        """Return the columns among `names` that contain plain values, and those that contain files."""
        return [*names], []


@dataclass(frozen=True)
class SharedCaches:
    """Cache format shared with other trainers: files next to the images, in one or more resolutions."""

    cache_format: str  # value of the table key `cache_format`
    # opens the caches of a table. Arguments: the table, names in npz files, the folder of the caches, and a
    # function that lists images in other folders. Raises DatasetError if the family has no such caches
    open_store: "Callable[[DatasetTable, NpzNames | None, Path, ListImages], CacheStore]"
