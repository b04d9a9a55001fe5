"""Compare how a cache folder stores its entries, in single files or in shards, with `cache_format`."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from dataset import cache_files
from dataset.config import DatasetTable
from modules.command import quote_command
from modules.errors import CacheError


def list_shard_errors(table: DatasetTable) -> list[str]:
    """Return a line for each unreadable cache shard of a table; [] for other cache formats."""
    if table.cache_format != "shards":
        return []
    from dataset.cache.shards import shard_errors  # only with shards

    return shard_errors(table.cache_directory)


def list_format_errors(table: DatasetTable, tag: str) -> Iterator[str]:
    """Yield an error if one of a table's caches exists only in another format than its `cache_format`.

    The table's folder may have single files and shards. A cache in both formats, as `tools/convert_cache.py
    --keep` leaves it, is not an error.
    """
    from dataset.cache.catalog import list_shards  # few folders are mixed
    from dataset.cache.shards import ShardStore

    def is_table_cache(name: str) -> bool:
        """Return whether a file is a cache for this table's kind (image or video) and model family."""
        # a cache of latents, audio or text embeddings
        for latent_tag in (tag, cache_files.audio_tag(tag)):
            if cache_files.parse_latent_name(name, latent_tag, table.kind) is not None:
                return True
        return cache_files.is_text_name(name.removesuffix(cache_files.PART), tag)

    folder = table.cache_directory
    expected_format = table.cache_format
    shards = ShardStore(folder) if list_shards(folder) else None
    misplaced = None  # the first cache that is only in the other format
    if expected_format == "shards":
        single_names = list_single_files(folder, is_table_cache)
        misplaced = next((name for name in single_names if shards is None or name not in shards), None)
    elif shards is not None:
        names_in_shards = filter(is_table_cache, shards.names())
        misplaced = next((name for name in names_in_shards if not (folder / name).exists()), None)
    if misplaced is not None:
        command = ["python", "tools/convert_cache.py"]
        command += ["--dataset_config", str(table.config_path), "--to", expected_format]
        found_in = "a separate file" if expected_format == "shards" else "a shard"
        yield (
            f'{table.name}: cache_format = "{expected_format}", but in {folder} {misplaced} is in '
            f"{found_in}.\n"
            f"  Convert the existing caches: {quote_command(command)}"
        )


def list_single_files(folder: Path, is_selected: Callable[[str], bool]) -> Iterator[str]:
    """Yield the names of a folder's cache files that `is_selected` accepts, sorted.

    The names of the tensors show whether a file is a cache; unreadable files are skipped.
    """
    if not folder.is_dir():
        return
    for name in sorted(os.listdir(folder)):
        if not is_selected(name):
            continue
        try:
            header = cache_files.read_entry(folder / name, is_full=False)
        except CacheError:
            continue
        maker = header.metadata.get("architecture", "")  # of any family
        if cache_files.is_latent_cache(header, maker) or cache_files.is_text_cache(header, maker):
            yield name
