"""Which files a dataset table means: pictures or clips with their captions and control media, from a folder or a JSONL list."""

from dataclasses import dataclass
from pathlib import Path

from dataset.config import DatasetTable


@dataclass(frozen=True)
class Source:
    """One picture or clip of a table. Nothing of it has been opened."""

    path: Path  # a file, or for a clip also a folder of images
    stem: str  # file name without suffix: the beginning of its cache names, unique within the table
    caption: str | None  # None: missing (see captions.missing_captions)
    caption_path: Path | None  # the text file of the caption, there or not; None: JSONL, or no caption_extension
    control: tuple[Path, ...]  # control images in order, or one control clip; () without control
    table: DatasetTable


def find_sources(table: DatasetTable, captions: bool = True) -> list[Source]:
    """All sources of a table, sorted by path. captions=False reads no caption files (latents do not need them).

    A missing caption is left None; files named by a JSONL list are not looked for.
    Raises DatasetError: a folder or list that is missing or empty, a malformed line, missing or misnamed control media, two sources
    with one stem (they would share one cache file).
    """
    raise NotImplementedError
