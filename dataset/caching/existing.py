"""Existing caches of a table: latents by the stem of their source, from names; those that are stale go.

A file is removed only if its tensor names show that it is a cache file, and only if it was there before the
run listed its sources.
"""

import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

from dataset.cache.files import (
    Header,
    LatentName,
    latent_names,
)
from dataset.cache.store import CacheStore
from dataset.sources.media_source import MediaSource
from modules.errors import CacheError

logger = logging.getLogger(__name__)

# the latent cache files of one source, with what their names say but for the stem
Names = Mapping[str, LatentName]


class LatentNames:
    """The latent caches of a table by the stem of their source. There may be millions."""

    def __init__(self, store: CacheStore, tag: str, kind: str) -> None:
        """List them, without opening one. kind: of the table, "image" or "video"."""
        self._rest: dict[str, LatentName] = {}  # by the end of a name
        self._names: dict[str, str | list[str]] = {}  # by stem; mostly there is one
        for file, stem, rest in latent_names(store.names(), tag, kind):
            self._rest.setdefault(file[len(stem) :], rest)
            before = self._names.setdefault(stem, file)
            if before is not file:
                self._names[stem] = [*([before] if isinstance(before, str) else before), file]

    def of(self, stem: str) -> Names:
        """Return those of one source."""
        return {file: self._rest[file[len(stem) :]] for file in self._files(stem)}

    def not_in(self, names: Container[str], but_of: Container[str]) -> list[str]:
        """Return the files that are not among `names`, by stem, without those of the sources `but_of`."""
        stale = {
            stem: [file for file in sorted(self._files(stem)) if file not in names]
            for stem in self._names
            if stem not in but_of and not all(file in names for file in self._files(stem))
        }
        return [file for _, files in sorted(stale.items()) for file in files]

    def _files(self, stem: str) -> Sequence[str]:
        found = self._names.get(stem)
        return () if found is None else (found,) if isinstance(found, str) else found


ExistingNames = Mapping[int, LatentNames]  # by table index


def names_of(existing: ExistingNames, source: MediaSource) -> Names:
    """Return the existing cache files of one source."""
    return existing[source.table.index].of(source.stem)


def remove_caches(store: CacheStore, names: Iterable[str], is_cache: Callable[[Header], bool]) -> int:
    """Remove those of `names` whose tensor names show that they are caches; return how many were removed."""
    count = 0
    for name in names:
        if store.is_shared(name):
            continue
        try:
            is_ours = store.has(name) and is_cache(store.read_header(name))
        except CacheError as error:
            if not store.has(name):  # another process has just removed it
                continue
            is_ours = store.holds_only_caches
            if not is_ours:
                logger.warning(
                    "%s. It belongs to no item, but is kept because it may not be a cache file.", error
                )
        if is_ours:
            store.remove(name)
            count += 1
    return count
