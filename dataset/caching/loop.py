"""The caching loop: encode media to latents and captions to text embeddings, with a record of their sources.

Both halves do the same: compare existing files with what this run would make, encode the rest, and, when all
processes are done, remove files that no longer belong to any item. A file is complete or missing, never
partial, so the same command continues a run that was killed. The work itself is in work.py; a run that does
only one shard of it removes nothing, because it does not know what the other machines make.
"""

from collections.abc import Sequence
from typing import Any

from dataset.cache.index import Indexes
from dataset.cache.store import Stores
from dataset.caching.cleanup import remove_stale_latents, remove_stale_texts
from dataset.caching.planning import Caches, SourcePlan
from dataset.caching.processes import Share, join_processes
from dataset.caching.reports import CacheReport, join_reports
from dataset.caching.work import EntryPlaces, MediaWork, TextWork
from dataset.config import DatasetConfig
from dataset.options import CachingOptions, ShardOptions
from modules.atomic_write import free_bytes
from modules.console import Row, as_size, count_of, show_box
from modules.devices import choose_device

NUMBER_BYTES = 2  # of a latent; float32 ones take twice as much


def cache_media(
    family: Caches, config: DatasetConfig, options: CachingOptions, places: EntryPlaces | None = None
) -> CacheReport:
    """Encode every item that has no valid latent cache, then remove stale files.

    places: where caches are kept, if not where the tables say.
    A source that cannot be read becomes a failure of the report and does not stop the others. The encoders
    are loaded only if there is something to encode. Raises DatasetError if the dataset cannot be used,
    CheckpointError if an encoder cannot be loaded, OutputError if a file cannot be written.
    """
    with join_processes() as share:
        device = choose_device(share.device_name(options.device))
        work = MediaWork(family, config, options, device, places)

        def announce(number: int, to_do: Sequence[SourcePlan]) -> None:
            rows: list[Row] = [
                ("data", str(config.path)),
                (_who(share, options.shard), f"{number} sources, {len(to_do)} of them to encode"),
                ("disk", _disk(config, family, to_do)),
                ("device", str(device)),
            ]
            show_box("Caching latents", rows)

        try:
            sources = share.of(options.shard.of(work.sources))
            done = work.encode(sources, share.is_main, announce if share.is_main else None)
        finally:
            work.free()
        work.stores.finish(config.datasets)
        gathered = share.gather(done)
        reports = [*(one.report for one in gathered), work.not_listed]
        failures = join_reports(reports).failures
        removed = 0
        if share.is_main and not options.keep_cache and not options.shard.is_given:
            for table in work.whole_tables:
                belongs = {name for one in gathered for index, name in one.right if index == table.index}
                failed = {one.stem for one in failures if one.table == table.index}
                existing = work.existing[table.index]
                removed += remove_stale_latents(
                    work.stores.of(table), existing, table.kind, family, belongs, failed
                )
        if share.is_main and not options.shard.is_given:
            work.stores.settle(config.datasets)
        _keep_index(share, work.index, work.stores, config)
        return join_reports(reports, sum(share.gather(removed)), share.is_main)


def cache_texts(
    family: Caches, config: DatasetConfig, options: CachingOptions, places: EntryPlaces | None = None
) -> CacheReport:
    """Encode every caption without a valid text cache, one encoder after the other; then remove stale files.

    A text cache is written when all encoders are through; until then there is a `.part`, which a later run
    continues. Raises DatasetError if a caption is missing, CheckpointError if an encoder cannot be loaded,
    OutputError if a file cannot be written.
    """
    with join_processes() as share:
        device = choose_device(share.device_name(options.device))
        work = TextWork(family, config, options, device, share.is_main, places)
        if share.is_main:
            captions = count_of(len(work.files), "caption")
            show_box("Caching texts", [("data", f"{config.path}, {captions}"), ("device", str(device))])
        try:
            done = work.encode(share.of(options.shard.of(work.batches)))
        finally:
            work.free()
        work.stores.finish(config.datasets)
        reports = [*share.gather(done), work.not_listed]
        removed = 0
        if share.is_main and not options.shard.is_given:
            for table in work.whole_tables:
                stems = {one.stem for one in work.sources if one.table.index == table.index}
                names = {file.file_name for file in work.files if file.table.index == table.index}
                surplus_of = stems if options.keep_cache else None
                existing = work.existing[table.index]
                removed += remove_stale_texts(work.stores.of(table), existing, family, names, surplus_of)
            work.stores.settle(config.datasets)
        _keep_index(share, work.index, work.stores, config)
        return join_reports(reports, sum(share.gather(removed)), share.is_main)


def _keep_index(share: Share, index: Indexes[Any], stores: Stores, config: DatasetConfig) -> None:
    """Write the facts that all processes verified, so that a later run need not read the files again."""
    of_tables = [stores.of(table) for table in config.datasets]
    gathered = share.gather(index.rows(of_tables))
    if share.is_main:
        index.write(of_tables, gathered)


def _disk(config: DatasetConfig, family: Caches, plans: Sequence[SourcePlan]) -> str | None:
    """Estimate what the latents of some sources take on disk; None if no size is known yet."""
    spec, sizes = family.latent, [size for plan in plans for size in plan.items]
    known = sum(plan.missing is not None for plan in plans)
    if not sizes:
        return None
    step, rows, columns = spec.stride

    def numbers(width: int, height: int, frames: int = 1) -> int:
        return spec.channels * ((frames - 1) // step + 1) * (height // rows) * (width // columns)

    needed = sum(numbers(*size) for size in sizes) * NUMBER_BYTES * len(plans) / known
    free = free_bytes(config.datasets[0].cache_directory)
    return f"about {as_size(needed)}, more with control or start images; {as_size(free)} free"


def _who(share: Share, shard: ShardOptions) -> str:
    words = ["latents"]
    if shard.num_shards is not None and shard.shard_index is not None:
        words.append(f"--shard_index {shard.shard_index} of {shard.num_shards} shards")
    if share.count > 1:
        words.append(f"process {share.rank + 1} of {share.count}")
    return ", ".join(words)
