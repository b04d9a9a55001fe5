"""Convert cache folders between single files and shards. Entries are copied byte for byte, whoever made
them; the originals go when all copies have been read again.
"""

import logging
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.cache.catalog import list_shards
from dataset.cache.files import PART, SUFFIX
from dataset.cache.forms import single_files
from dataset.cache.shards import ShardStore
from dataset.config import DatasetConfig
from dataset.options import ConvertCacheOptions
from dataset.shard_names import INDEX
from modules.atomic_write import explain_errors, remove_leftovers, write_bytes
from modules.bars import track
from modules.console import as_size
from modules.errors import CacheError, OptionError
from modules.file_locks import try_lock

logger = logging.getLogger(__name__)

# latents of any family, then texts: the first, further ones, the empty prompt, unfinished ones
_CACHE_NAME = re.compile(
    rf"(.+_[0-9]+x[0-9]+_[a-z0-9]+|.+_[a-z0-9]+_te(\.caption[0-9]+)?|[a-z0-9]+_te\.empty)"
    rf"{re.escape(SUFFIX)}({re.escape(PART)})?",
    re.DOTALL,
)


@dataclass(frozen=True)
class ConvertedFolder:
    """The result, or the plan, for one folder."""

    entries: int  # copied
    there: int  # that were there already
    size_bytes: int  # of those copied


def convert_caches(options: ConvertCacheOptions, config: DatasetConfig | None) -> list[ConvertedFolder]:
    """Convert folders and log the results.

    Raises CacheError if entries are damaged, OutputError if something cannot be written; then all that was
    there is still there, and the same command goes on.
    """
    npz = [table for table in (config.datasets if config else ()) if table.cache_format == "npz"]
    if npz:
        raise OptionError(
            f'{npz[0].name}: cache_format = "npz": only a caching script knows which of the sizes in a file '
            "are this table's. Set another cache_format and cache again"
        )
    folders = options.cache_directory or ()
    if config is not None:
        folders = tuple(table.cache_directory for table in config.datasets)
    convert = files_to_shards if options.to == "shards" else shards_to_files
    results = []
    for folder in folders:
        done = convert(folder, options.keep, options.dry_run)
        results.append(done)
        logger.info(
            "%s: %d entries %s %s, %s%s",
            folder,
            done.entries,
            "would become" if options.dry_run else "are now",
            options.to,
            as_size(done.size_bytes),
            f"; {done.there} were there already" if done.there else "",
        )
    if config is not None and any(table.cache_format != options.to for table in config.datasets):
        logger.info('Set cache_format = "%s" in %s.', options.to, config.path)
    return results


def is_cache_name(name: str) -> bool:
    """Whether a name is that of a cache of any family."""
    return not name.startswith(".") and _CACHE_NAME.fullmatch(name) is not None


def files_to_shards(folder: Path, keep: bool = False, dry_run: bool = False) -> ConvertedFolder:
    """Put the single files of a folder into shards. Files that are no caches stay as they are.

    keep: leave the files too. dry_run: change nothing. Raises CacheError, OutputError.
    """
    names = list(single_files(folder, is_cache_name))
    store = ShardStore(folder)
    copied = size_bytes = 0
    for name in track(names, f"Packing {folder.name}", len(names)):
        data = (folder / name).read_bytes()
        if _holds(store, name, data):
            continue
        if store.has(name) and not dry_run:
            logger.warning("%s is in a shard too, with other contents: the file replaces it", folder / name)
        copied, size_bytes = copied + 1, size_bytes + len(data)
        if not dry_run:
            store.write_bytes(name, data)
    if not dry_run:
        store.settle()
        if not keep:
            _remove_files(folder, names)
    return ConvertedFolder(copied, len(names) - copied, size_bytes)


def _remove_files(folder: Path, names: Sequence[str]) -> None:
    """Remove single files whose bytes are also in the shards, opened anew."""
    store = ShardStore(folder)
    for name in names:
        data = (folder / name).read_bytes()
        if store.read_bytes(name) != data:
            raise CacheError(f"{folder / name}: its copy in the shards differs; the file is kept")
    with explain_errors(folder):
        for name in names:
            (folder / name).unlink(missing_ok=True)


def shards_to_files(folder: Path, keep: bool = False, dry_run: bool = False) -> ConvertedFolder:
    """Write each entry of a folder's shards as a single file.

    keep: leave the shards too. dry_run: change nothing. Raises CacheError if entries are damaged: the others
    are files then, the shards are kept. Raises OutputError.
    """
    store = ShardStore(folder)
    if not dry_run:
        store.settle()  # what a killed run left is whole after it
        if folder.is_dir():
            remove_leftovers(folder, is_cache_name, older_seconds=0)
    names = sorted(store.names())
    copied = size_bytes = 0
    damaged = [] if dry_run else store.faults()
    for name in track(names, f"Unpacking {folder.name}", len(names)):
        try:
            data = store.read_bytes(name)
        except CacheError as error:
            damaged.append(str(error))
            continue
        path = folder / name
        if path.is_file() and path.read_bytes() == data:
            continue
        if path.exists() and not dry_run:
            logger.warning("%s is there with other contents: the entry of the shard replaces it", path)
        copied, size_bytes = copied + 1, size_bytes + len(data)
        if not dry_run:
            write_bytes(path, data)
    if damaged:
        raise CacheError(
            f"{folder}: {len(damaged)} faults in the shards, which are kept; {copied} entries are whole. "
            f"The first: {damaged[0]}.\n"
            '  Cache again with cache_format = "shards", which repairs them, then convert again.'
        )
    if not dry_run and not keep:
        _remove_shards(folder, names)
    return ConvertedFolder(copied, len(names) - copied, size_bytes)


def _remove_shards(folder: Path, names: Sequence[str]) -> None:
    """Remove the shards of a folder if single files have the bytes of all their entries."""
    store = ShardStore(folder)
    if set(store.names()) != set(names):
        raise CacheError(f"{folder}: entries were added meanwhile; the shards are kept. Run this again.")
    for name in names:
        if zlib.crc32((folder / name).read_bytes()) != zlib.crc32(store.read_bytes(name)):
            raise CacheError(f"{folder / name}: the file differs from its entry; the shards are kept")
    with explain_errors(folder):
        for shard in list_shards(folder):
            with (folder / shard).open("rb+") as file:
                if try_lock(file) is False:
                    raise CacheError(f"{folder / shard}: another process writes it. Run this again later.")
        # the index first: without the shards it would say that all of them are lost
        (folder / INDEX).unlink(missing_ok=True)
        for shard in list_shards(folder):
            (folder / shard).unlink(missing_ok=True)


def _holds(store: ShardStore, name: str, data: bytes) -> bool:
    try:
        return store.has(name) and store.read_bytes(name) == data
    except CacheError:
        return False
