"""A JSON file of image trainers: caption and tags by picture. A subset of the image guides' form names it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dataset.forms.contract import DataForm
from dataset.table import DatasetTable

if TYPE_CHECKING:  # torch is not loaded to read a dataset file
    from dataset.sources.media_source import Fault, MediaSource


@dataclass(frozen=True)
class MetadataKeys:
    """The key that such subsets have, which `SUBSET_KEYS` declares."""

    metadata_file: Path
    folder = None  # `dataset.subsets` chooses where their caches are

    @property
    def source(self) -> Path:
        return self.metadata_file

    def source_key(self, kind: str) -> str:
        return "metadata_file"


def list_sources(table: DatasetTable, faults: "list[Fault]") -> "list[MediaSource]":
    from dataset.forms.metadata_listing import list_metadata  # it loads what decodes

    return list_metadata(table, table.source, faults)


METADATA = DataForm(
    "metadata files",
    keys=MetadataKeys,
    entry="metadata_file",
    list_sources=list_sources,
    caption_place=lambda table: 'neither "caption" nor "tags" in its entry',
    has_caches_of_others=True,
    names_pictures_anywhere=True,
)
