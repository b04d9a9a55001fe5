"""List the sources of a table with tars."""

from dataset.config import DatasetTable
from dataset.sources.faults import Fault
from dataset.sources.media_source import MediaSource
from modules.errors import DatasetError


def list_tars(table: DatasetTable, faults: list[Fault]) -> list[MediaSource]:
    """Return the sources of the table, in any order; add what is wrong to `faults`.

    Raises DatasetError if there is nothing to list.
    """
    raise DatasetError(f"{table.name}: {table.source_key} is not supported yet")
