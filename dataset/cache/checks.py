"""Whether the sources of caches have changed since they were encoded, as training asks for every item that it
reads.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dataset.cache.records import FileIdentity, is_unchanged, modified_ns
from dataset.config import DatasetTable
from dataset.sources.captions import captions_in, read_caption

MOST_KNOWN = 1 << 16  # items that are remembered: a few megabytes


@dataclass
class CacheChecks:
    """The checks of one run. An edit during the run does not end it: files newer than `started_ns` pass.

    Sources that are gone are no fault: training needs only the caches.
    """

    started_ns: int = field(default_factory=time.time_ns)
    most_known: int = MOST_KNOWN
    # table and key of items whose sources are as they were
    _known: set[tuple[int, str]] = field(default_factory=set)

    def knows(self, table: int, key: str) -> bool:
        """Whether the item was found right before, and is still remembered."""
        return (table, key) in self._known

    def add(self, table: int, key: str) -> None:
        """Remember an item that was found right; when there are too many, all others are forgotten and looked
        at again.
        """
        if len(self._known) >= self.most_known:
            self._known.clear()
        self._known.add((table, key))

    def changed_file(self, folders: Sequence[Path | None], files: tuple[FileIdentity, ...]) -> Path | None:
        """Return the first existing source that has changed.

        folders: of each file; None if unknown.
        """
        for folder, file in zip(folders, files, strict=True):
            path = None if folder is None else folder / file.name
            if (
                path is not None
                and path.exists()
                and not is_unchanged(file, path)
                and modified_ns(path) <= self.started_ns
            ):
                return path
        return None

    def changed_caption(self, path: Path, caption: str, table: DatasetTable, number: int = 0) -> str | None:
        """Return the text of a caption file if it is there and its caption `number` is not `caption`."""
        now = read_caption(path)
        if now is None or captions_in(now, table)[number : number + 1] == (caption,):
            return None
        return now if modified_ns(path) <= self.started_ns else None
