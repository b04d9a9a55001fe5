"""List the texts to encode: one cache file per caption, and one per table for the empty prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.cache.files import empty_text_name, text_file_name
from dataset.config import DatasetTable
from dataset.sources.media_source import MediaSource, pause_collection


@dataclass(frozen=True, slots=True)
class CaptionFile:
    """One text, and the cache file of its embeddings. There may be a million."""

    table: DatasetTable
    file_name: str  # of the cache file
    name: str  # for messages
    caption: str | None
    caption_path: Path | None  # the text file it is from, there or not
    settings: Mapping[str, Any] = field(default_factory=dict)  # as in `TextRecord`
    pass_over: int = 0  # 0: the first captions of a table, 1: further ones, 2: the empty prompt
    embeds: Path | None = None  # what text encoders gave for it, computed before

    @property
    def path(self) -> Path:
        """Return the path of the cache file."""
        return self.table.cache_directory / self.file_name


def list_caption_files(sources: Sequence[MediaSource], tag: str) -> list[CaptionFile]:
    """Return the texts of all sources, table by table: first captions, further ones, then the empty prompt.

    First captions come first, so that their batches are those of a table without more texts.
    """
    tables: dict[int, list[MediaSource]] = {}
    for source in sources:
        tables.setdefault(source.table.index, []).append(source)
    with pause_collection():
        return [one for found in tables.values() for one in _files_of_table(found[0].table, found, tag)]


def _files_of_table(table: DatasetTable, sources: Sequence[MediaSource], tag: str) -> list[CaptionFile]:
    files = []
    alone = table.caption_settings
    for source in sources:
        captions = (source.caption, *source.more_captions)
        settings = alone if len(captions) == 1 else {**alone, "captions": len(captions)}
        for number, caption in enumerate(captions):
            path = text_file_name(source.stem, tag, number)
            embeds = None if source.tensors is None or number else source.tensors.embeds
            pass_over = min(number, 1)
            files.append(
                CaptionFile(
                    table, path, source.stem, caption, source.caption_path, settings, pass_over, embeds
                )
            )
    if table.drops_captions:
        path = empty_text_name(tag)
        files.append(CaptionFile(table, path, "the empty prompt", "", None, pass_over=2))
    return sorted(files, key=lambda file: file.pass_over)
