"""Metadata files of sd-scripts: JSON with the caption and tags of each image, which a subset names."""

from dataclasses import dataclass
from pathlib import Path

from dataset.forms.contract import SourceFormat
from dataset.sources.media_source import Fault, MediaSource
from dataset.table import DatasetTable


@dataclass(frozen=True)
class MetadataKeys:
    """The key `metadata_file` of a subset: the path of a JSON file that lists images and captions."""

    metadata_file: Path
    folder = None  # `dataset.subsets` sets the cache directory

    @property
    def source(self) -> Path:
        """The metadata JSON file."""
        return self.metadata_file

    def source_key(self, kind: str) -> str:
        """Return "metadata_file", the table key of the source; only image tables have it."""
        return "metadata_file"


class Metadata(SourceFormat):
    """Format of images that are listed in a metadata JSON file, as image trainers write it."""

    name = "metadata files"
    keys = MetadataKeys
    metadata_key = "metadata_file"
    shares_caches_with_other_programs = True
    names_images_anywhere = True

    def list_sources(self, table: DatasetTable, faults: list[Fault]) -> list[MediaSource]:
        """Return the images that the metadata file lists."""
        from dataset.forms.metadata_listing import list_metadata  # it loads decoders

        return list_metadata(table, table.source.path, faults)

    def describe_caption_place(self, table: DatasetTable) -> str:
        """Return where a missing caption is expected: in the image's entry of the metadata file."""
        return 'neither "caption" nor "tags" in its entry'


METADATA = Metadata()
