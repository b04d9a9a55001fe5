"""Run a caching script after its options are read: show what the model will see, check, or cache."""

import sys

from dataset.caching.loop import cache_media, cache_texts, workers_of
from dataset.caching.planning import Caches
from dataset.caching.reports import conclude
from dataset.check import CheckResult, check_media, check_texts
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
        _end_with(check_media(family, config, workers_of(options), options.skip_existing))
    else:
        conclude(cache_media(family, config, options))


def run_text_caching(family: Caches, config: DatasetConfig, options: CachingOptions) -> None:
    """Run --check, or the caching of texts.

    Raises UserError if caching fails, and SystemExit with the result of a check.
    """
    if options.check:
        _end_with(check_texts(family, config, options.skip_existing))
    conclude(cache_texts(family, config, options))


def _end_with(result: CheckResult) -> None:
    sys.stdout.write(escape_control_codes("\n".join(result.lines)) + "\n")
    raise SystemExit(result.exit_code)
