"""Convert a cache folder: single files to shards, and back.

Entries are copied byte for byte, whichever program made them. The originals are removed only after all
copies have been read again.
"""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dataset import cache_files
from dataset.cache.catalog import Catalog
from dataset.cache.form import list_single_files
from dataset.cache.index import NAME as INDEX
from dataset.cache.shards import ShardStore, merge_shards, shard_errors
from dataset.cache.store import SingleFiles
from dataset.config import DatasetConfig
from dataset.forms.composing import SHARED_CACHES
from dataset.options import ConvertCacheOptions
from dataset.sources.media_source import OLD_INDEXES
from modules.atomic_write import explain_errors, remove_leftovers
from modules.bars import track
from modules.console import format_size
from modules.errors import CacheError, OptionError

logger = logging.getLogger(__name__)


class Converted(NamedTuple):
    """Results of a cache conversion: numbers of copied and unchanged entries, and their size."""

    copied: int  # number of entries
    unchanged: int  # number of entries that were in the new format already
    size_bytes: int  # total size of the copied entries
    errors: tuple[str, ...]  # messages about entries that cannot be read


def convert_caches(options: ConvertCacheOptions, config: DatasetConfig | None) -> None:
    """Convert the cache folders of a dataset, or those that the options name, and log the results.

    Raises:
        OptionError: If a table's caches are shared with other trainers.
        CacheError: If entries are damaged.
        OutputError: If a file cannot be written. Nothing is lost, and the same command continues.
    """
    folders = options.cache_directory or ()
    if config is not None:
        for table in config.datasets:
            if table.cache_format in SHARED_CACHES:
                raise OptionError(
                    f'{table.name}: cache_format = "{table.cache_format}": only a caching script knows which '
                    "of the sizes in a file are this table's. Set another cache_format and cache again"
                )
        folders = tuple(table.cache_directory for table in config.datasets)
    convert = files_to_shards if options.to == "shards" else shards_to_files
    for folder in folders:
        converted = convert(folder, options.keep, options.dry_run)
        logger.info(
            "%s: %d entries %s %s, %s%s",
            folder,
            converted.copied,
            "would become" if options.dry_run else "are now",
            options.to,
            format_size(converted.size_bytes),
            f"; {converted.unchanged} existed already" if converted.unchanged else "",
        )
    if config is not None and any(table.cache_format != options.to for table in config.datasets):
        logger.info('Set cache_format = "%s" in %s.', options.to, config.path)


def files_to_shards(folder: Path, keep: bool = False, dry_run: bool = False) -> Converted:
    """Copy a folder's single cache files into shards, then remove them. Other files are not touched.

    Tar shards of earlier versions are converted to SQLite shards.

    Args:
        folder: Cache folder.
        keep: Whether to keep the single files, too.
        dry_run: Whether to change nothing and only count.

    Raises:
        CacheError: If a file is damaged; then no file is removed.
        OutputError: If a shard cannot be written.
    """
    names = list(list_single_files(folder, cache_files.is_cache_name))
    files, shards = SingleFiles(folder), ShardStore(folder)
    converted = _copy(names, files, target=shards, entry_noun="file", dry_run=dry_run)
    if converted.errors:
        raise CacheError("\n  ".join(converted.errors))
    if not dry_run:
        shards.close()  # finishes the last shard
        merge_shards(folder, with_tars=True)
        if not keep:
            _require_equal(names, folder)  # compares the copies before the originals are removed
            with explain_errors(folder):
                for name in (*names, INDEX):  # only single files have an index
                    files.remove(name)
    return converted


def shards_to_files(folder: Path, keep: bool = False, dry_run: bool = False) -> Converted:
    """Write each entry of a folder's shards as a single file, then remove the shards.

    Args:
        folder: Cache folder.
        keep: Whether to keep the shards, too.
        dry_run: Whether to change nothing and only count.

    Raises:
        CacheError: If entries are damaged. All other entries are written, and the shards stay.
        OutputError: If a file cannot be written.
    """
    shards = ShardStore(folder)
    if not dry_run:
        shards.close(is_last=True)  # finishes the shards of killed runs
        if folder.is_dir():
            remove_leftovers(folder, cache_files.is_cache_name, older_seconds=0)
    names = sorted(filter(cache_files.is_safe_name, shards.names()))
    unreadable_shards = [] if dry_run else shard_errors(folder)
    converted = _copy(
        names, shards, target=SingleFiles(folder), entry_noun="entry of the shard", dry_run=dry_run
    )
    errors = [*unreadable_shards, *converted.errors]
    if errors:
        raise CacheError(
            f"{folder}: {len(errors)} errors in the shards, which are kept; {converted.copied} entries are "
            f"intact. The first error: {errors[0]}.\n"
            '  Cache again with cache_format = "shards", which repairs them, then convert again.'
        )
    if not dry_run and not keep:
        # every entry has been written as a single file
        _require_equal(names, folder)
        catalog = Catalog(folder)  # read again: other processes may have written
        if set(catalog.names()) != set(names):
            raise CacheError(
                f"{folder}: entries were added in the meantime; the shards are kept. Run this again."
            )
        unfinished_shard = next((name for name in catalog.shard_sizes if name.endswith(".writing")), None)
        if unfinished_shard is not None:
            raise CacheError(
                f"{folder / unfinished_shard}: another process is writing it. Run this again later."
            )
        with explain_errors(folder):
            for name in (*OLD_INDEXES, *catalog.shard_sizes):
                (folder / name).unlink(missing_ok=True)
    return converted


ByteStore = SingleFiles | ShardStore


def _copy(
    names: Sequence[str], source: ByteStore, target: ByteStore, entry_noun: str, dry_run: bool
) -> Converted:
    """Copy the entries that are missing or different in the target store; count them and their bytes."""
    copied = unchanged = size_bytes = 0
    errors: list[str] = []
    for name in track(names, f"Converting {source.folder.name}", len(names), unit="file"):
        try:
            data = source.read_bytes(name)
        except CacheError as error:
            errors.append(str(error))
            continue
        if name in target:
            with contextlib.suppress(CacheError):  # a damaged entry of the target is replaced
                if target.read_bytes(name) == data:
                    unchanged += 1
                    continue
            if not dry_run:
                path = target.folder / name
                logger.warning(
                    "%s exists in both formats, with different contents: the %s replaces it", path, entry_noun
                )
        copied += 1
        size_bytes += len(data)
        if not dry_run:
            target.write_bytes(name, data)
    return Converted(copied, unchanged, size_bytes, tuple(errors))


def _require_equal(names: Sequence[str], folder: Path) -> None:
    """Reopen the shards, and raise CacheError if an entry differs from the cache file of the same name."""
    files, shards = SingleFiles(folder), ShardStore(folder)
    for name in names:
        if files.read_bytes(name) != shards.read_bytes(name):
            raise CacheError(f"{folder / name}: the file differs from its entry in the shards; both are kept")
