"""What a form of data is: one record, of which each phase of reading a dataset asks its part.

A form is where the items of a table are (a folder, a list, tars), how the rows of a table are written
(Parquet, CSV), or how caches are kept for other programs. It is one light file, or one with a heavy half next
to it, and its lines in `dataset/forms/__init__.py`. Without these every script does all the rest as before.
No phase names a form but folders and JSONL lists: what is asked of all forms is in `composing.py`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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


ListPictures = Callable[[], Mapping[str, Path]]  # by stem, without suffix
FindCell = Callable[[TableRow], "PackedFile | None"]  # the file in a row; None: it has none


class LookedAt(NamedTuple):
    """A list or table, as remarks about its columns look at it."""

    media: str  # column of the media
    read: set[str]  # columns that are read, except companions by number
    cells: list[str]  # unread columns that hold whole files
    rows: Iterator[TableRow]  # with the media, control and other unread columns
    is_list: bool = False  # its rows are written for this program


@dataclass(frozen=True, eq=False, repr=False)  # compared as objects, never printed
class DataForm:
    """A form of data. All but the name may be left out."""

    name: str  # as in messages

    # --- its tables in a dataset file
    # the key that says where the items are: behind `image_` and `video_`, or alone
    source: str = ""
    keys: type[OwnKeys] | None = None  # the keys that its tables alone have
    shared_keys: tuple[str, ...] = ()  # keys of some forms that its tables take as well
    # given the fields of a table: which of them conflict; None: none do
    find_conflict: Callable[[Mapping[str, Any]], str | None] | None = None
    # given these, and the table's place in the file: changes those that depend on others, with a warning
    complete: Callable[[dict[str, Any], str], None] | None = None
    entry: str = ""  # of the source in the metadata of a subset, in place of its class and repeats

    # --- sources
    # adds errors to the list. Raises DatasetError. A folder has none: it is what listing does by itself
    list_sources: "Callable[[DatasetTable, list[Fault]], list[MediaSource]] | None" = None
    empty: str = "has no lines"  # behind the name of a source that has no items, {kind} filled in
    # where a caption was looked for, which is missing
    caption_place: Callable[[DatasetTable], str] | None = None
    # opens a list or table for remarks about columns that nothing reads
    look_at: Callable[[DatasetTable], LookedAt] | None = None
    # addresses of what has to be downloaded before the sources can be listed
    addresses: Callable[[DatasetTable], list[str]] | None = None
    is_listed_in_training: bool = False  # to compare the companions of items with those of now
    has_caches_of_others: bool = False  # other programs keep theirs next to the pictures
    names_pictures_anywhere: bool = False  # pictures of one table may be in many folders

    # --- rows of tables
    suffixes: tuple[str, ...] = ()  # of files
    folder_of_parts: str = ""  # what a folder of such files is called; "": they are single
    # given a file or folder. Raises DatasetError
    column_names: Callable[[Path], tuple[str, ...]] | None = None
    # likewise, with the columns that are wanted, None: all. Rows that cannot be read have a fault
    read_rows: Callable[[Path, Collection[str] | None], Iterator[TableRow]] | None = None
    # given a column and whether cells may be null: finds its files; None: it holds none
    find_cells: Callable[[Path, str, bool], FindCell | None] | None = None
    # the columns of some names whose values can be read cheaply, and those that hold whole files
    plain_columns: Callable[[Path, Collection[str]], tuple[list[str], list[str]]] | None = None
    is_text: bool = True  # its files can be decoded and corrected as text
    has_header: bool = False  # the first line names the columns

    # --- caches
    cache_format: str = ""  # the value of the key of this name
    # opens the caches of a table, given their names and folder, and what lists pictures elsewhere. Raises
    # DatasetError if the family has no such caches
    open_caches: "Callable[[DatasetTable, NpzNames | None, Path, ListPictures], CacheStore] | None" = None
    cache_conflict: Callable[[str], str | None] | None = None  # given the kind of a table
    not_converted: str = ""  # why such caches become no others
