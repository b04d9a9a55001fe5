"""Compare the form of a cache folder, single files or shards, with `cache_format`."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dataset import cache_files
from dataset.config import DatasetTable
from modules.command import as_typed
from modules.errors import CacheError, DatasetError


def require_form(tables: Iterable[DatasetTable], tag: str) -> None:
    """Check that caches are in the form that the `cache_format` of their table names.

    Args:
        tables: Tables that `may_be_mixed`.
        tag: The family's cache_tag.

    Raises:
        DatasetError: If caches are in another form; the message has the command that converts them.
    """
    errors = [line for table in tables for line in other_form(table, tag)]
    if errors:
        raise DatasetError("\n".join(errors))


def list_shard_errors(table: DatasetTable) -> list[str]:
    """Return the errors of a table's shards, if it has any."""
    if table.cache_format != "shards":
        return []
    from dataset.cache.shards import shard_errors  # only with shards

    return shard_errors(table.cache_directory)


def other_form(table: DatasetTable, tag: str) -> Iterator[str]:
    """Yield an error if a table that `may_be_mixed` has caches only in another form than its `cache_format`.

    Caches in both forms, as `tools/convert_cache.py --keep` leaves them, are not an error.
    """
    from dataset.cache.catalog import list_shards  # few folders are mixed
    from dataset.cache.shards import ShardStore

    def is_of_table(name: str) -> bool:
        return _is_of(name, tag, table.kind)

    folder, form = table.cache_directory, table.cache_format
    shards = ShardStore(folder) if list_shards(folder) else None
    first = None  # the first cache in the other form alone
    if form == "shards":
        single_names = single_files(folder, is_of_table)
        first = next((name for name in single_names if shards is None or name not in shards), None)
    elif shards is not None:
        names_in_shards = filter(is_of_table, shards.names())
        first = next((name for name in names_in_shards if not (folder / name).exists()), None)
    if first is not None:
        words = ["python", "tools/convert_cache.py", "--dataset_config", str(table.config_path), "--to", form]
        where = "a file of its own" if form == "shards" else "a shard"
        yield (
            f'{table.name}: cache_format = "{form}", but in {folder} {first} is in {where}.\n'
            f"  Convert what is there: {as_typed(words)}"
        )


def _is_of(name: str, tag: str, kind: str) -> bool:
    """Return whether an entry is one of a family's: latents, sound or texts.

    `tag` is the family's cache_tag.
    """
    for latent_tag in (tag, cache_files.audio_tag(tag)):
        if cache_files.parse_latent_name(name, latent_tag, kind) is not None:
            return True
    return cache_files.is_text_name(name.removesuffix(cache_files.PART), tag)


def single_files(folder: Path, of: Callable[[str], bool]) -> Iterator[str]:
    """Yield the names of a folder's files for which `of` holds and whose tensors are those of a cache."""
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        if not of(name):
            continue
        try:
            header = cache_files.read_entry(folder / name, is_full=False)
        except CacheError:
            continue
        maker = header.metadata.get("architecture", "")
        if cache_files.is_latent_cache(header, maker) or cache_files.is_text_cache(header, maker):
            yield name
