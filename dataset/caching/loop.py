"""The caching loop: encode media to latents and captions to text embeddings, with a record of their sources.

Both halves do the same: compare existing files with what this run would make, encode the rest, and, when all
processes are done, remove files that no longer belong to any item. A file is complete or missing, never
partial, so the same command continues a run that was killed. The encoding is in latents.py and texts.py.
"""

import logging
import os
from collections.abc import Sequence

from dataset.cache.files import text_file_name
from dataset.caching.cleanup import remove_stale_latents, remove_stale_texts
from dataset.caching.latents import LatentEncoding
from dataset.caching.planning import Caches, Recipe, SourcePlan, list_names, media_table, plan_all
from dataset.caching.processes import Share, join_processes
from dataset.caching.reports import CacheReport, Failure, join_reports
from dataset.caching.texts import TextEncoding
from dataset.config import DatasetConfig
from dataset.options import CachingOptions
from dataset.sources.listing import find_sources, require_captions
from modules.devices import choose_device

logger = logging.getLogger(__name__)


def cache_media(family: Caches, config: DatasetConfig, options: CachingOptions) -> CacheReport:
    """Encode every item that has no valid latent cache, then remove stale files.

    A source that cannot be read becomes a failure of the report and does not stop the others. The encoders
    are loaded only if there is something to encode. Raises DatasetError if the dataset cannot be used,
    CheckpointError if an encoder cannot be loaded, OutputError if a file cannot be written.
    """
    sources = []
    for table in config.datasets:
        found = find_sources(table, captions=False)
        family.check_table(media_table(table, any(source.control for source in found)))
        sources += found
    family.check_given_files()
    recipe = recipe_of(family, options.skip_existing)
    existing = {table.index: list_names(table, recipe.tag) for table in config.datasets}
    workers = workers_of(options)
    with join_processes() as share:
        plans, failures = plan_all(share.of(sources), existing, recipe, workers, share.is_main)
        to_do = [plan for plan in plans if plan.missing is None or plan.missing]
        logger.info(
            "%s: %d sources, %d of them to encode", _who(share), len(plans) + len(failures), len(to_do)
        )
        encoding = LatentEncoding(
            family, recipe, choose_device(share.device_name(options.device)), options.batch_size
        )
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
        )
        right = {
            (plan.source.table.index, name) for plan in finished for name in plan.kept
        } | encoding.written
        gathered = share.gather((report, right))
        reports, names = [one for one, _ in gathered], [theirs for _, theirs in gathered]
        removed = 0
        if share.is_main and not options.keep_cache:
            for table in config.datasets:
                belongs = {name for of_process in names for index, name in of_process if index == table.index}
                failed = {one.stem for one in join_reports(reports).failures if one.table == table.index}
                removed += remove_stale_latents(table, family, belongs, failed)
        return join_reports(reports, sum(share.gather(removed)), share.is_main)


def cache_texts(family: Caches, config: DatasetConfig, options: CachingOptions) -> CacheReport:
    """Encode every caption without a valid text cache, one encoder after the other; then remove stale files.

    A text cache gets its final name when all encoders have written; until then it is a `.part`, which a later
    run continues. Raises DatasetError if a caption is missing, CheckpointError if an encoder cannot be
    loaded, OutputError if a file cannot be written.
    """
    sources = [source for table in config.datasets for source in find_sources(table)]
    require_captions(sources)
    family.check_given_files()
    with join_processes() as share:
        device = choose_device(share.device_name(options.device))
        encoding = TextEncoding(
            family, device, options.batch_size, workers_of(options), options.skip_existing, share.is_main
        )
        encoding.run(share.of(sources))
        reports = share.gather(CacheReport(encoding.written, encoding.kept, encoding.foreign))
        removed = 0
        if share.is_main and not options.keep_cache:
            for table in config.datasets:
                names = {
                    text_file_name(one.stem, family.cache_tag)
                    for one in sources
                    if one.table.index == table.index
                }
                removed += remove_stale_texts(table, family, names)
        return join_reports(reports, sum(share.gather(removed)), share.is_main)


def log_outdated(plans: Sequence[SourcePlan]) -> None:
    """Log why existing files were made again, so that the extra work is explained."""
    reasons = [plan.outdated for plan in plans if plan.outdated is not None]
    if reasons:
        logger.info(
            "%d sources had outdated cache files, which were made again. The first: %s",
            len(reasons),
            reasons[0],
        )


def recipe_of(family: Caches, skip_existing: bool) -> Recipe:
    """Return how this run makes latents. Reads the identity of the encoders' files."""
    latent, fps = family.latent, family.defaults.fps
    return Recipe(family.cache_tag, family.media_identity, latent, fps, skip_existing, family.sections_of)


def workers_of(options: CachingOptions) -> int:
    """Return how many threads read ahead."""
    return options.num_workers or max(1, (os.cpu_count() or 2) - 1)


def _who(share: Share) -> str:
    return "latents" if share.count == 1 else f"latents, process {share.rank + 1} of {share.count}"
