"""What a form of data is: where the items of a table are, how rows are written, how caches are stored.

Each is one light file, or one with a heavy half next to it, and its lines in `dataset/forms/__init__.py`.
Without these every script does all the rest as before. Reading a dataset names folders and JSONL lists alone;
it finds the others by the keys of a table (`DataForm`), the suffix of a file (`RowFormat`) or the value of
`cache_format` (`SharedCaches`), as `composing.py` lists them.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from dataset.table import DatasetTable, OwnKeys

if TYPE_CHECKING:  # torch is not loaded to read a dataset file
    from dataset.cache_files import CacheStore, NpzNames
    from dataset.sources.media_source import Fault, MediaSource, PackedFile


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a list or a table."""

    file: Path  # if there are several parts, the part with this row
    unit: str  # what `number` counts: "line", or "row" in Parquet
    number: int  # from 1; of a CSV row over several lines, the first; in CSV the first line is the header
    # by column: values that are not null
    values: Mapping[str, Any] = field(default_factory=dict)
    fault: str | None = None  # why it has no values: "it has 3 cells, the header has 2"

    @property
    def where(self) -> str:
        """Return `data.csv, line 3` for messages."""
        return f"{self.file}, {self.unit} {self.number}"


ListImages = Callable[[], Mapping[str, Path]]  # by stem, without suffix
FindCell = Callable[[TableRow], "PackedFile | None"]  # the file in a row; None: it has none


class LookedAt(NamedTuple):
    """A list or table, as warnings about its columns look at it."""

    media: str  # column of the media
    read: set[str]  # columns that are read, except companions by number
    cells: list[str]  # unread columns that hold whole files
    rows: Iterator[TableRow]  # with the media, control and other unread columns
    is_list: bool = False  # its rows are written for this program


class DataForm:
    """Form in which items are stored: a folder, a list, a table or tars; subclasses define the details."""

    name: ClassVar[str]  # as in messages
    # the key that says where the items are: behind `image_` and `video_`, or alone
    source: ClassVar[str] = ""
    keys: ClassVar[type[OwnKeys] | None] = None  # the keys that its tables alone have
    shared_keys: ClassVar[tuple[str, ...]] = ()  # keys of some forms that its tables take as well
    metadata_key: ClassVar[str] = ""  # of the source in a subset's metadata, in place of class and repeats
    empty: ClassVar[str] = "has no lines"  # behind the name of an empty source, {kind} filled in
    has_columns: ClassVar[bool] = False  # `look_at` opens it, for warnings about columns that nothing reads
    is_listed_in_training: ClassVar[bool] = False  # to compare the companions of items with those of now
    has_caches_of_others: ClassVar[bool] = False  # other programs keep theirs next to the images
    names_images_anywhere: ClassVar[bool] = False  # images of one table may be in many folders
    has_dependent_keys: ClassVar[bool] = False  # `find_conflict` and `complete` look at the fields of a table

    def find_conflict(self, fields: Mapping[str, Any]) -> str | None:
        """Return which fields of a table conflict; None if none do."""
        return None

    def complete(self, fields: dict[str, Any], where: str) -> None:
        """Adapt fields that depend on others, with a warning; `where` is the table's position in the file."""

    def list_sources(self, table: DatasetTable, faults: "list[Fault]") -> "list[MediaSource]":
        """Return the sources of a table; errors go to the list.

        Raises:
            DatasetError: If it cannot be read.
        """
        raise NotImplementedError(self.name)  # folders: listing reads them by itself

    def describe_caption_place(self, table: DatasetTable) -> str:
        """Return where a caption was looked for, which is missing."""
        return "no caption_extension in its table, such as .txt"

    def look_at(self, table: DatasetTable) -> LookedAt:
        """Open a list or table for warnings about its columns."""
        raise NotImplementedError(self.name)

    def list_addresses(self, table: DatasetTable) -> list[str]:
        """Return the addresses of what is downloaded before the sources of a table can be listed."""
        return []


class RowFormat:
    """File format of the rows of a list or table, such as JSONL or CSV; subclasses define the details."""

    suffixes: ClassVar[tuple[str, ...]]  # of files
    is_text: ClassVar[bool] = True  # its files can be decoded and corrected as text
    has_header: ClassVar[bool] = False  # the first line names the columns

    def reads(self, path: Path) -> bool:
        """Return whether a file or folder is in this format, judged by its name."""
        return path.suffix.lower() in self.suffixes and not path.is_dir()

    def list_names(self) -> list[str]:
        """Return what it reads, for messages."""
        return [*self.suffixes]

    def column_names(self, path: Path) -> tuple[str, ...]:
        """Return the names of the columns.

        Raises:
            DatasetError: If the file cannot be read or has none.
        """
        raise NotImplementedError

    def read_rows(self, path: Path, names: Collection[str] | None) -> Iterator[TableRow]:
        """Yield the rows with some columns, None: all. Rows that cannot be read have a fault."""
        raise NotImplementedError

    def find_cells(self, path: Path, name: str, finds_nulls: bool) -> FindCell | None:
        """Return a function that finds the file in a row's cell; None if the column holds no files."""
        return None

    def plain_columns(self, path: Path, names: Collection[str]) -> tuple[list[str], list[str]]:
        """Return those columns whose values can be read cheaply, and those that hold whole files."""
        return [*names], []


@dataclass(frozen=True)
class SharedCaches:
    """Caches that other programs share: next to the images, with entries for several resolutions."""

    cache_format: str  # the value of the key of this name
    # opens the caches of a table, given the family's names of entries, their folder, and what lists images
    # elsewhere. Raises DatasetError if the family has no such caches
    open_store: "Callable[[DatasetTable, NpzNames | None, Path, ListImages], CacheStore]"
