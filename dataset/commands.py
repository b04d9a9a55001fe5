"""Run a caching script after its options are read: show what the model will see, check, or cache."""

import sys
from collections.abc import Sequence

from dataset.caching.loop import cache_media, cache_texts, workers_of
from dataset.caching.planning import Caches
from dataset.caching.reports import conclude
from dataset.check import check_media, check_texts
from dataset.checking.captions import load_counters
from dataset.checking.findings import CheckResult, join_findings
from dataset.checking.page import write_check_page
from dataset.checking.repair import repair_captions
from dataset.config import DatasetConfig
from dataset.debug_views import show_datasets
from dataset.options import CachingOptions, DebugOptions
from modules.control_codes import escape_control_codes


def run_latent_caching(
    family: Caches, config: DatasetConfig, options: CachingOptions, debug: DebugOptions
) -> None:
    """Run --debug_mode, --check, or the caching of latents.

    Raises UserError if caching fails, and SystemExit with the result of a check.
    """
    if debug.debug_mode is not None:
        conclude(show_datasets(family, config, debug, workers_of(options)))
    elif options.check:
        _repair(config, options)
        result = check_media(family, config, workers_of(options), options.skip_existing)
        _write_page(family, config, options, result)
        _end_with(result)
    else:
        conclude(cache_media(family, config, options))


def run_text_caching(family: Caches, config: DatasetConfig, options: CachingOptions) -> None:
    """Run --check, or the caching of texts.

    Raises UserError if caching fails, and SystemExit with the result of a check.
    """
    if options.check:
        _repair(config, options)
        result = check_texts(family, config, options.skip_existing)
        if options.page.html is not None:  # it shows the media too
            media = check_media(family, config, workers_of(options), options.skip_existing)
            result = join_findings(media, result)
        _write_page(family, config, options, result)
        _end_with(result)
    conclude(cache_texts(family, config, options))


def _repair(config: DatasetConfig, options: CachingOptions) -> None:
    if options.repair_captions is not None:
        _say(repair_captions(config, options.repair_captions).lines)


def _write_page(family: Caches, config: DatasetConfig, options: CachingOptions, result: CheckResult) -> None:
    page = options.page
    if page.html is not None:
        counters, fps = load_counters(family.text_encoders), family.defaults.fps
        write_check_page(
            page.html, config, result, counters, family.latent, fps, page.html_items, workers_of(options)
        )


def _end_with(result: CheckResult) -> None:
    _say(result.lines)
    raise SystemExit(result.exit_code)


def _say(lines: Sequence[str]) -> None:
    sys.stdout.write(escape_control_codes("\n".join(lines)) + "\n")
