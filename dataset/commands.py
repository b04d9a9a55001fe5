"""Run a caching script after its options are read: show the model's inputs, check, or cache."""

import time
from collections.abc import Callable

from dataset.caching.existing import Caches
from dataset.caching.loop import cache_media, cache_texts
from dataset.caching.reports import CacheReport, conclude
from dataset.caching.work import workers_of
from dataset.config import DatasetConfig
from dataset.options import CachingOptions, DebugOptions
from modules.console import Row, in_words
from modules.devices import choose_device, leave_cudnn_out
from modules.installation import import_own
from modules.planning.device_memory import peak_in_words


def run_latent_caching(
    family: Caches, config: DatasetConfig, options: CachingOptions, debug: DebugOptions, following: str = ""
) -> None:
    """Run --debug_mode, --check, or the caching of latents. following: the command that comes next.

    Raises UserError if caching fails, and SystemExit with the result of a check.
    """
    if debug.debug_mode is not None:
        views = import_own("data_tools.report.views")
        conclude(views.show_datasets(family, config, debug, workers_of(options)))
    elif options.check:
        raise SystemExit(import_own("data_tools.report.check").check_latent_caching(family, config, options))
    else:
        _cache(cache_media, family, config, options, "sources", ("Next, cache the captions", following))


def run_text_caching(
    family: Caches, config: DatasetConfig, options: CachingOptions, following: str = ""
) -> None:
    """Run --check, or the caching of texts. following: the command that comes next.

    Raises UserError if caching fails, and SystemExit with the result of a check.
    """
    if options.check:
        raise SystemExit(import_own("data_tools.report.check").check_text_caching(family, config, options))
    next_command = "Next, check all before training", following
    _cache(cache_texts, family, config, options, "captions", next_command)


def _cache(
    cache: Callable[[Caches, DatasetConfig, CachingOptions], CacheReport],
    family: Caches,
    config: DatasetConfig,
    options: CachingOptions,
    what: str,
    following: Row,
) -> None:
    """Cache, and show the results. what: sources or captions. following: shown if no shard is missing."""
    if options.disable_cudnn_backend:
        leave_cudnn_out()
    start = time.monotonic()
    report = cache(family, config, options)
    memory = peak_in_words(choose_device(options.device))
    costs: list[Row] = [("time", in_words(time.monotonic() - start)), ("peak memory", memory)]
    if not options.shard.is_given:
        conclude(report, costs, [following])
        return
    rows: list[Row] = [
        ("this shard", f"{report.share} of {report.whole} {what}"),
        (
            "when all are done",
            "run this command once without --num_shards and --shard_index: it checks everything, makes what "
            "is missing and removes what is stale",
        ),
    ]
    conclude(report, [*rows, *costs])
