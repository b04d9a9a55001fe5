"""Find the form of a cache folder, single files or shards, and compare it with `cache_format`."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from dataset.cache.catalog import list_shards
from dataset.cache.files import (
    PART,
    is_latent_cache,
    is_text_cache,
    is_text_name,
    parse_latent_name,
    read_header,
)
from dataset.cache.shards import ShardStore
from dataset.cache.store import CacheStore
from dataset.config import DatasetConfig, DatasetTable
from dataset.shard_names import is_of_shards
from modules.command import as_typed
from modules.errors import CacheError, DatasetError


def require_form(config: DatasetConfig, tag: str) -> None:
    """Raise DatasetError, with the command that converts, if a table has caches of a family in the form that
    its `cache_format` does not say.

    tag: of the family, in the names of its caches.
    """
    said = [line for table in config.datasets for line in other_form(table, tag)]
    if said:
        raise DatasetError("\n".join(said))


def unsound(store: CacheStore, names: Collection[str], table: DatasetTable, tag: str) -> list[str]:
    """Return why the caches of a table may be incomplete: another form, or shards that are not whole.

    names: of the store, as they have just been listed.
    """
    return [*other_form(table, tag, names), *store.faults()]


def other_form(table: DatasetTable, tag: str, names_there: Collection[str] | None = None) -> Iterator[str]:
    """Yield a fault if a table has caches of a family in another form than `cache_format`.

    Those in both forms, as `tools/convert_cache.py --keep` leaves them, are no fault. names_there:
    of the table's store, so that a folder of single files is not listed again.
    """
    folder, form = table.cache_directory, table.cache_format
    if form == "npz":  # beside files of other forms, which other trainings may use
        return
    if form == "files" and names_there is not None and not any(map(is_of_shards, names_there)):
        return
    shards = ShardStore(folder) if list_shards(folder) else None
    names: Iterable[str]
    if form == "shards":
        names = single_files(folder, lambda name: is_of(name, tag, table.kind))
        found = next((name for name in names if shards is None or not shards.has(name)), None)
    else:
        names = [name for name in shards.names() if is_of(name, tag, table.kind)] if shards else ()
        found = next((name for name in names if not (folder / name).exists()), None)
    if found is not None:
        words = ["python", "tools/convert_cache.py", "--dataset_config", str(table.config_path), "--to", form]
        is_in = "a file of its own" if form == "shards" else "a shard"
        yield (
            f'{table.name}: cache_format = "{form}", but in {folder} {found} is in {is_in}.\n'
            f"  Convert what is there: {as_typed(words)}"
        )


def is_of(name: str, tag: str, kind: str) -> bool:
    """Whether a name is that of a cache of a family, finished or not."""
    return parse_latent_name(name, tag, kind) is not None or is_text_name(name.removesuffix(PART), tag)


def single_files(folder: Path, of: Callable[[str], bool]) -> Iterator[str]:
    """Yield the names of the cache files in a folder for which `of` holds."""
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        if of(name) and is_cache_file(folder / name):
            yield name


def is_cache_file(path: Path) -> bool:
    """Whether a file can be read and its tensors are those of a cache, of whatever family."""
    try:
        header = read_header(path)
    except CacheError:
        return False
    maker = header.metadata.get("architecture", "")
    return is_latent_cache(header, maker) or is_text_cache(header, maker)
