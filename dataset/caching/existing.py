"""Existing caches of a table: latents by the stem of their source, from names; those that are stale go.

A file is removed only if its tensor names show that it is a cache file, and only if it was there before the
run listed its sources.
"""

import logging
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence

from dataset.cache.files import (
    PART,
    Header,
    LatentName,
    is_latent_cache,
    is_text_cache,
    is_text_name,
    latent_names,
    parse_latent_name,
    parse_more_text_name,
)
from dataset.cache.store import CacheStore
from dataset.sources.media_source import MediaSource
from modules.contract.family import Described
from modules.errors import CacheError

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


logger = logging.getLogger(__name__)


def remove_stale_latents(
    store: CacheStore,
    existing: LatentNames,
    kind: str,
    family: Described,
    names: Container[str],
    failed_stems: Container[str],
) -> int:
    """Remove latent caches not in `names`, except those of sources that failed in this run.

    existing: those that were there before the sources were listed. Later additions of others are ignored.
    kind: of the table, "image" or "video". Returns how many were removed.
    """
    tag = family.cache_tag
    stale = existing.not_in(names, but_of=failed_stems)
    store.sweep(lambda name: parse_latent_name(name, tag, kind) is not None)
    return remove_caches(store, stale, family.name)


def remove_caches(store: CacheStore, names: Iterable[str], architecture: str) -> int:
    """Remove those of `names` whose tensor names show that they are latent caches of the family.

    Returns how many were removed.
    """
    return _remove(store, names, lambda header: is_latent_cache(header, architecture))


def list_texts(store: CacheStore, tag: str) -> frozenset[str]:
    """Return the names of the family's text caches in a store, also of unfinished ones."""
    return frozenset(name for name in store.names() if is_text_name(name.removesuffix(PART), tag))


def remove_stale_texts(
    store: CacheStore,
    existing: Collection[str],
    family: Described,
    names: Container[str],
    surplus_of: Container[str] | None = None,
) -> int:
    """Remove text caches not in `names`, also unfinished ones. Returns how many were removed.

    existing: as `list_texts` gave them before the sources were listed; later additions of others are ignored.
    surplus_of: only further captions of these sources (by stem), which have fewer captions now.
    """
    tag = family.cache_tag
    stale = [name for name in sorted(existing) if name.removesuffix(PART) not in names]
    if surplus_of is not None:
        further = [(name, parse_more_text_name(name.removesuffix(PART), tag)) for name in stale]
        stale = [name for name, parsed in further if parsed is not None and parsed[0] in surplus_of]
    else:
        store.sweep(lambda name: is_text_name(name.removesuffix(PART), tag))
    return _remove(store, stale, lambda header: is_text_cache(header, family.name))


def _remove(store: CacheStore, names: Iterable[str], is_cache: Callable[[Header], bool]) -> int:
    count = 0
    for name in names:
        if store.is_shared(name):
            continue
        try:
            is_ours = store.has(name) and is_cache(store.read_header(name))
        except CacheError as error:
            if not store.has(name):  # another process has just removed it
                continue
            if store.holds_only_caches:
                store.remove(name)
                count += 1
                continue
            logger.warning(
                "%s. It belongs to no item, but is kept because it may not be a cache file.",
                error,
            )
            continue
        if is_ours:
            store.remove(name)
            count += 1
    return count
