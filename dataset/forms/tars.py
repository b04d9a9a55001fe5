"""WebDataset tars: a sample is the files of a tar whose names are equal up to the first dot."""

from dataclasses import dataclass
from pathlib import Path

from dataset import config_keys as forms
from dataset.config_keys import source_field
from dataset.forms.contract import SourceFormat
from dataset.sources.media_source import Fault, MediaSource
from dataset.table import DatasetTable
from modules.paths import hide_secrets, is_address


@dataclass(frozen=True)
class TarKeys:
    """The keys that only dataset tables of tar files have."""

    tars: tuple[str, ...] = source_field(forms.TARS)  # paths, glob patterns or URLs
    folder = None  # there is no default: the dataset file has to name a cache_directory

    @property
    def source(self) -> Path:
        """The first tar path, glob pattern or URL (without passwords)."""
        return Path(hide_secrets(self.tars[0]))

    def source_key(self, kind: str) -> str:
        """Return the key that names the tars: "image_tars" or "video_tars"."""
        return f"{kind}_tars"


class Tars(SourceFormat):
    """Source format of media and captions in tar files, on disk or at URLs."""

    name = "tars"
    source = "tars"
    keys = TarKeys
    shared_keys = ("caption_column", "allow_urls", "download_directory")
    empty = "holds no {kind}s"

    def list_sources(self, table: DatasetTable, faults: list[Fault]) -> list[MediaSource]:
        """Return the samples in the tars; remote tars are downloaded first."""
        from dataset.forms.tars_listing import list_tars  # it loads decoders

        return list_tars(table, table.source.require_format_keys(TarKeys).tars, faults)

    def describe_caption_place(self, table: DatasetTable) -> str:
        """Return where a missing caption is expected: a tar member with the same name as the media file."""
        return "no text file and no caption in a .json of the same name in the tar"

    def list_addresses(self, table: DatasetTable) -> list[str]:
        """Return the tars that have to be downloaded: URLs instead of paths."""
        return [tar for tar in table.source.require_format_keys(TarKeys).tars if is_address(tar)]


TARS = Tars()
