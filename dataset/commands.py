"""Run a caching script after its options are read: show what the model will see, check, or cache."""

import sys
import time

from dataset.caching.loop import cache_media, cache_texts, workers_of
from dataset.caching.planning import Caches
from dataset.caching.reports import conclude
from dataset.check import CheckResult, check_media, check_texts
from dataset.config import DatasetConfig
from dataset.debug_views import show_datasets
from dataset.options import CachingOptions, DebugOptions
from modules.console import Row, in_words
from modules.control_codes import escape_control_codes
from modules.devices import choose_device
from modules.planning.device_memory import peak_in_words


def run_latent_caching(
    family: Caches, config: DatasetConfig, options: CachingOptions, debug: DebugOptions, following: str = ""
) -> None:
    """Run --debug_mode, --check, or the caching of latents. following: the command that comes next.

    Raises UserError if caching fails, and SystemExit with the result of a check.
    """
    if debug.debug_mode is not None:
        conclude(show_datasets(family, config, debug, workers_of(options)))
    elif options.check:
        _end_with(check_media(family, config, workers_of(options), options.skip_existing))
    else:
        start = time.monotonic()
        report = cache_media(family, config, options)
        conclude(report, _costs(options, start), [("Next, cache the captions", following)])


def run_text_caching(
    family: Caches, config: DatasetConfig, options: CachingOptions, following: str = ""
) -> None:
    """Run --check, or the caching of texts. following: the command that comes next.

    Raises UserError if caching fails, and SystemExit with the result of a check.
    """
    if options.check:
        _end_with(check_texts(family, config, options.skip_existing))
    start = time.monotonic()
    report = cache_texts(family, config, options)
    conclude(report, _costs(options, start), [("Next, check all before training", following)])


def _costs(options: CachingOptions, start: float) -> list[Row]:
    """Return the rows of a box about time and memory. start: of `time.monotonic`."""
    memory = peak_in_words(choose_device(options.device))
    return [("time", in_words(time.monotonic() - start)), ("peak memory", memory)]


def _end_with(result: CheckResult) -> None:
    sys.stdout.write(escape_control_codes("\n".join(result.lines)) + "\n")
    raise SystemExit(result.exit_code)
