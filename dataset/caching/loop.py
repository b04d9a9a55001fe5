"""The caching loop: encode media to latents and captions to text embeddings, with a record of their sources.

Both halves do the same: compare existing files with what this run would make, encode the rest, and, when all
processes are done, remove files that no longer belong to any item. A file is complete or missing, never
partial, so the same command continues a run that was killed. The encoding is in latents.py and texts.py.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

from dataset.cache.index import Indexes
from dataset.cache.store import Stores
from dataset.caching.caption_files import list_caption_files
from dataset.caching.cleanup import remove_stale_latents, remove_stale_texts
from dataset.caching.latents import LatentEncoding
from dataset.caching.planning import (
    Caches,
    LatentNames,
    Recipe,
    SourcePlan,
    latent_index,
    media_table,
    plan_all,
)
from dataset.caching.processes import Share, join_processes
from dataset.caching.reports import CacheReport, Failure, join_reports
from dataset.caching.texts import TextEncoding, Texts, text_index
from dataset.config import DatasetConfig
from dataset.options import CachingOptions
from dataset.sources.decoding import check_resolution
from dataset.sources.listing import find_all_sources, require_captions, warn_missing_captions
from dataset.sources.media_source import MediaSource
from modules.atomic_write import free_bytes
from modules.console import Row, as_size, count_of, show_box
from modules.devices import choose_device
from modules.errors import DatasetError

logger = logging.getLogger(__name__)

NUMBER_BYTES = 2  # of a latent; float32 ones take twice as much


def cache_media(family: Caches, config: DatasetConfig, options: CachingOptions) -> CacheReport:
    """Encode every item that has no valid latent cache, then remove stale files.

    A source that cannot be read becomes a failure of the report and does not stop the others. The encoders
    are loaded only if there is something to encode. Raises DatasetError if the dataset cannot be used,
    CheckpointError if an encoder cannot be loaded, OutputError if a file cannot be written.
    """
    sources = find_all_sources(config, captions=False)
    _check_tables(family, config, sources)
    warn_missing_captions(sources)
    family.check_given_files()
    recipe = recipe_of(family, options.skip_existing, options.verify)
    stores = recipe.stores
    existing = {
        table.index: LatentNames(stores.of(table), recipe.tag, table.kind) for table in config.datasets
    }
    workers = workers_of(options)
    with join_processes() as share:
        plans, failures = plan_all(share.of(sources), existing, recipe, workers, share.is_main)
        to_do = [plan for plan in plans if plan.missing is None or plan.missing]
        device = choose_device(share.device_name(options.device))
        encoding = LatentEncoding(family, recipe, device, options.batch_size)
        rows: list[Row] = [
            ("data", str(config.path)),
            (_who(share), f"{len(plans) + len(failures)} sources, {len(to_do)} of them to encode"),
            ("disk", _disk(config, family, to_do)),
            ("device", str(device)),
        ]
        if share.is_main:
            show_box("Caching latents", rows)
        if to_do:
            encoding.run(to_do, existing, workers, share.is_main)
        finished = [plan for plan in plans if plan.missing == ()] + encoding.finished
        log_outdated(finished)
        report = CacheReport(
            written=len(encoding.written),
            kept=sum(len(plan.kept) for plan in finished),
            foreign=sum(plan.foreign for plan in finished),
            failures=(*failures, *encoding.failures),
            dropped=tuple(
                Failure.of(plan.source, plan.reason) for plan in finished if plan.reason is not None
            ),
            shortened=tuple(
                Failure.of(plan.source, plan.short) for plan in finished if plan.short is not None
            ),
        )
        right = {
            (plan.source.table.index, name) for plan in finished for name in plan.kept
        } | encoding.written
        stores.finish(config.datasets)
        gathered = share.gather((report, right))
        reports, names = [one for one, _ in gathered], [theirs for _, theirs in gathered]
        removed = 0
        if share.is_main and not options.keep_cache:
            for table in config.datasets:
                belongs = {name for of_process in names for index, name in of_process if index == table.index}
                failed = {one.stem for one in join_reports(reports).failures if one.table == table.index}
                removed += remove_stale_latents(stores.of(table), table.kind, family, belongs, failed)
        _keep_index(share, recipe.index, stores, config)
        return join_reports(reports, sum(share.gather(removed)), share.is_main)


def cache_texts(family: Caches, config: DatasetConfig, options: CachingOptions) -> CacheReport:
    """Encode every caption without a valid text cache, one encoder after the other; then remove stale files.

    A text cache gets its final name when all encoders have written; until then it is a `.part`, which a later
    run continues. Raises DatasetError if a caption is missing, CheckpointError if an encoder cannot be
    loaded, OutputError if a file cannot be written.
    """
    sources = find_all_sources(config)
    require_captions(sources)
    family.check_given_files()
    with join_processes() as share:
        device = choose_device(share.device_name(options.device))
        stores = Stores()
        texts = Texts(stores, options.skip_existing, text_index(options.verify))
        encoding = TextEncoding(family, device, options.batch_size, workers_of(options), share.is_main, texts)
        files = list_caption_files(sources, family.cache_tag)
        if share.is_main:
            captions = count_of(len(files), "caption")
            show_box("Caching texts", [("data", f"{config.path}, {captions}"), ("device", str(device))])
        encoding.run(share.of(files))
        stores.finish(config.datasets)
        reports = share.gather(CacheReport(encoding.written, encoding.kept, encoding.foreign))
        removed = 0
        if share.is_main:
            for table in config.datasets:
                stems = {one.stem for one in sources if one.table.index == table.index}
                names = {file.path.name for file in files if file.table.index == table.index}
                surplus_of = stems if options.keep_cache else None
                removed += remove_stale_texts(stores.of(table), family, names, surplus_of)
        _keep_index(share, texts.index, stores, config)
        return join_reports(reports, sum(share.gather(removed)), share.is_main)


def _check_tables(family: Caches, config: DatasetConfig, sources: Sequence[MediaSource]) -> None:
    """Raise DatasetError with the reasons of all tables that cannot be cached."""
    problems = []
    for table in config.datasets:
        has_control = any(source.control for source in sources if source.table is table)
        try:
            check_resolution(table, family.latent.pixel_step)
            family.check_table(media_table(table, has_control))
        except DatasetError as error:
            problems.append(str(error))
    if problems:
        raise DatasetError("\n".join(problems))


def _keep_index(share: Share, index: Indexes[Any], stores: Stores, config: DatasetConfig) -> None:
    """Write what all processes have verified, so that a later run need not read it again."""
    of_tables = [stores.of(table) for table in config.datasets]
    gathered = share.gather(index.rows(of_tables))
    if share.is_main:
        index.write(of_tables, gathered)


def log_outdated(plans: Sequence[SourcePlan]) -> None:
    """Log why existing files were made again, so that the extra work is explained."""
    reasons = [plan.outdated for plan in plans if plan.outdated is not None]
    if reasons:
        logger.info(
            "%d sources had outdated cache files, which were made again. The first: %s",
            len(reasons),
            reasons[0],
        )


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


def recipe_of(family: Caches, skip_existing: bool, verify: bool) -> Recipe:
    """Return how this run makes latents. Reads the identity of the encoders' files."""
    latent, fps = family.latent, family.defaults.fps
    return Recipe(
        family.cache_tag,
        family.media_identity,
        latent,
        fps,
        skip_existing,
        family.sections_of,
        index=latent_index(verify),
    )


def workers_of(options: CachingOptions) -> int:
    """Return how many threads read ahead."""
    return options.num_workers or max(1, (os.cpu_count() or 2) - 1)


def _who(share: Share) -> str:
    return "latents" if share.count == 1 else f"latents, process {share.rank + 1} of {share.count}"
