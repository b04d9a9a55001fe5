"""Remove cache files that no longer belong to any item.

A file is removed only if its tensor names show that it is a cache file.
"""

import logging
from collections.abc import Callable, Container, Iterable

from dataset.cache.files import (
    PART,
    Header,
    is_latent_cache,
    is_text_cache,
    is_text_name,
    parse_latent_name,
    parse_more_text_name,
)
from dataset.cache.store import CacheStore
from dataset.caching.planning import Caches
from modules.errors import CacheError

logger = logging.getLogger(__name__)


def remove_stale_latents(
    store: CacheStore, kind: str, family: Caches, names: Container[str], failed_stems: Container[str]
) -> int:
    """Remove latent caches not in `names`, except those of sources that failed in this run.

    kind: of the table, "image" or "video". Returns how many were removed.
    """
    tag = family.cache_tag
    stale = []
    for file in sorted(store.names()):
        name = parse_latent_name(file, tag, kind)
        if name is not None and file not in names and name.stem not in failed_stems:
            stale.append(file)
    store.sweep(lambda name: parse_latent_name(name, tag, kind) is not None)
    return remove_caches(store, stale, family.name)


def remove_caches(store: CacheStore, names: Iterable[str], architecture: str) -> int:
    """Remove those of `names` whose tensor names show that they are latent caches of the family.

    Returns how many were removed.
    """
    return _remove(store, names, lambda header: is_latent_cache(header, architecture))


def remove_stale_texts(
    store: CacheStore, family: Caches, names: Container[str], surplus_of: Container[str] | None = None
) -> int:
    """Remove text caches not in `names`, also unfinished ones. Returns how many were removed.

    surplus_of: only further captions of these sources (by stem), which have fewer captions now.
    """

    def is_text(name: str) -> bool:
        return is_text_name(name.removesuffix(PART), family.cache_tag)

    stale = [name for name in sorted(store.names()) if is_text(name) and name.removesuffix(PART) not in names]
    if surplus_of is not None:
        further = [(name, parse_more_text_name(name.removesuffix(PART), family.cache_tag)) for name in stale]
        stale = [name for name, parsed in further if parsed is not None and parsed[0] in surplus_of]
    else:
        store.sweep(is_text)
    return _remove(store, stale, lambda header: is_text_cache(header, family.name))


def _remove(store: CacheStore, names: Iterable[str], is_cache: Callable[[Header], bool]) -> int:
    count = 0
    for name in names:
        try:
            is_ours = store.has(name) and is_cache(store.read_header(name))
        except CacheError as error:
            logger.warning(
                "%s. It belongs to no item, but is kept because it may not be a cache file.",
                error,
            )
            continue
        if is_ours:
            store.remove(name)
            count += 1
    return count
