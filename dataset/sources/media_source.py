"""A source of a dataset: an image or clip with its caption and what belongs to it; nothing is opened yet."""

from dataclasses import dataclass
from pathlib import Path

from dataset.config import DatasetTable
from dataset.config_keys import FROM_ALPHA, FROM_FILE


@dataclass(frozen=True, slots=True)
class MediaSource:
    """An image or clip of a table. No media file has been opened."""

    path: Path  # a file, or for a clip also a folder of images
    stem: str  # file name without suffix: the beginning of its cache names, unique within the table
    caption: str | None  # None: missing (see `missing_captions`), or not read
    # the text file of the caption, there or not; None: in a list, or no caption_extension
    caption_path: Path | None
    control: tuple[Path, ...]  # control images in order, or one control clip; () without control
    table: DatasetTable
    more_captions: tuple[str, ...] = ()  # of multi_caption: those after the first
    mask: Path | None = None  # an image, clip or folder of images: white is learned

    @property
    def mask_from(self) -> str | None:
        """Return FROM_FILE, FROM_ALPHA, or None."""
        return FROM_ALPHA if self.table.alpha_mask else FROM_FILE if self.mask is not None else None
