"""Run a caching script after its options are read: show the model's inputs, check, or cache."""

import time

from dataset.caching.loop import cache_media, cache_texts
from dataset.caching.planning import Caches
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
        _prepare(options)
        start = time.monotonic()
        report = cache_media(family, config, options)
        _conclude(report, "sources", options, start, ("Next, cache the captions", following))


def run_text_caching(
    family: Caches, config: DatasetConfig, options: CachingOptions, following: str = ""
) -> None:
    """Run --check, or the caching of texts. following: the command that comes next.

    Raises UserError if caching fails, and SystemExit with the result of a check.
    """
    if options.check:
        raise SystemExit(import_own("data_tools.report.check").check_text_caching(family, config, options))
    _prepare(options)
    start = time.monotonic()
    report = cache_texts(family, config, options)
    _conclude(report, "captions", options, start, ("Next, check all before training", following))


def _conclude(report: CacheReport, what: str, options: CachingOptions, start: float, following: Row) -> None:
    """Show the results. what: the report's sources or captions. following: shown if no shard is missing."""
    costs = _costs(options, start)
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


def _prepare(options: CachingOptions) -> None:
    if options.disable_cudnn_backend:
        leave_cudnn_out()


def _costs(options: CachingOptions, start: float) -> list[Row]:
    """Return the rows of a box about time and memory. start: of `time.monotonic`."""
    memory = peak_in_words(choose_device(options.device))
    return [("time", in_words(time.monotonic() - start)), ("peak memory", memory)]
