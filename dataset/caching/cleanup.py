"""Remove cache files that no longer belong to any item.

A file is removed only if its tensor names show that it is a cache file.
"""

import logging
from collections.abc import Callable, Container, Iterable
from pathlib import Path

from dataset.cache.files import (
    PART,
    Header,
    is_latent_cache,
    is_text_cache,
    is_text_name,
    parse_latent_name,
    parse_more_text_name,
    read_header,
)
from dataset.caching.planning import Caches
from dataset.config import DatasetTable
from modules.atomic_write import remove_leftovers
from modules.errors import CacheError

logger = logging.getLogger(__name__)


def remove_stale_latents(
    table: DatasetTable, family: Caches, names: Container[str], failed_stems: Container[str]
) -> int:
    """Remove latent caches not in `names`, except those of sources that failed in this run.

    Returns how many were removed.
    """
    tag = family.cache_tag
    stale = []
    for path in _list_names(table):
        name = parse_latent_name(path.name, tag, table.kind)
        if name is not None and path.name not in names and name.stem not in failed_stems:
            stale.append(path)
    _remove_leftovers(table, lambda name: parse_latent_name(name, tag, table.kind) is not None)
    return remove_caches(stale, family.name)


def remove_caches(paths: Iterable[Path], architecture: str) -> int:
    """Remove those of `paths` whose tensor names show that they are latent caches of the family.

    Returns how many were removed.
    """
    return _remove(paths, lambda header: is_latent_cache(header, architecture))


def remove_stale_texts(
    table: DatasetTable, family: Caches, names: Container[str], surplus_of: Container[str] | None = None
) -> int:
    """Remove text caches not in `names`, also unfinished ones. Returns how many were removed.

    surplus_of: only further captions of these sources (by stem), which have fewer captions now.
    """

    def is_text(name: str) -> bool:
        return is_text_name(name.removesuffix(PART), family.cache_tag)

    stale = [
        path
        for path in _list_names(table)
        if is_text(path.name) and path.name.removesuffix(PART) not in names
    ]
    if surplus_of is not None:
        names_of = {path: path.name.removesuffix(PART) for path in stale}
        further = [(path, parse_more_text_name(name, family.cache_tag)) for path, name in names_of.items()]
        stale = [path for path, name in further if name is not None and name[0] in surplus_of]
    else:
        _remove_leftovers(table, is_text)
    return _remove(stale, lambda header: is_text_cache(header, family.name))


def _list_names(table: DatasetTable) -> list[Path]:
    return sorted(table.cache_directory.iterdir()) if table.cache_directory.is_dir() else []


def _remove(paths: Iterable[Path], is_cache: Callable[[Header], bool]) -> int:
    count = 0
    for path in paths:
        try:
            is_ours = path.is_file() and is_cache(read_header(path))
        except CacheError as error:
            logger.warning(
                "%s. It belongs to no item, but is kept because it may not be a cache file.",
                error,
            )
            continue
        if is_ours:
            path.unlink(missing_ok=True)
            count += 1
    return count


def _remove_leftovers(table: DatasetTable, of: Callable[[str], bool]) -> None:
    """Remove a killed run's temporary files, of any age: all processes of this run have finished writing."""
    if table.cache_directory.is_dir():
        remove_leftovers(table.cache_directory, of, older_seconds=0)
