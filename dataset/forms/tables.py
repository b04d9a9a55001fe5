"""Tables of any format and origin, with a column of paths, URLs or files."""

from dataclasses import dataclass
from pathlib import Path

from dataset import config_keys as forms
from dataset.config_keys import NOTHING, key, source_field
from dataset.forms.contract import InspectedColumns, SourceFormat
from dataset.sources.media_source import Fault, MediaSource
from dataset.table import DatasetTable


@dataclass(frozen=True)
class TableKeys:
    """Keys of dataset tables that read their rows from a table file, such as Parquet or CSV."""

    table_file: Path = source_field(forms.LIST_PATH)
    path_column: str | None = key(forms.COLUMN, stale=NOTHING)  # None: the default names
    folder = None  # there is no default: the dataset file has to name a cache_directory

    @property
    def source(self) -> Path:
        """The table's file, or a folder with several of them."""
        return self.table_file

    def source_key(self, kind: str) -> str:
        """Return the table key of the source: "image_table_file" or "video_table_file"."""
        return f"{kind}_table_file"


class Tables(SourceFormat):
    """Source format of table files whose rows name paths or URLs, or contain the files themselves."""

    name = "tables"
    source = "table_file"
    keys = TableKeys
    shared_keys = ("control_column", "caption_column", "allow_urls", "download_directory")
    has_columns = True
    is_listed_in_training = True

    def list_sources(self, table: DatasetTable, faults: list[Fault]) -> list[MediaSource]:
        """Return the media files that the rows of the table name or contain."""
        from dataset.forms.tables_listing import list_table  # it loads decoders

        return list_table(table, table.source.require_format_keys(TableKeys).path_column, faults)

    def describe_caption_place(self, table: DatasetTable) -> str:
        """Return where a missing caption is expected: in the caption column of the row."""
        return f'no "{table.captions.caption_column or "caption"}" in its row'

    def inspect_columns(self, table: DatasetTable) -> InspectedColumns:
        """Return the rows of the table, and which columns are read."""
        from dataset.forms.tables_listing import inspect_table

        return inspect_table(table, table.source.require_format_keys(TableKeys).path_column)


TABLES = Tables()
