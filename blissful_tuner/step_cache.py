"""Step caches of a video: from options and a prompt line to a runner around the network's blocks."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from blissful_tuner.options import StepCacheOptions
from modules.errors import OptionError
from modules.option_values import MAX_NUMBER, format_number
from protocols.family import DitSpec
from protocols.requests import Prepared
from protocols.rules import MagCache, MagCalibration, StepCaching, TeaCache, TeaCalibration
from protocols.steps import DitAt
from runtime import step_cache

logger = logging.getLogger(__name__)

SHORT_NAMES = {  # option -> its short name in a prompt line
    "magcache_retention_ratio": "mcrr",
    "magcache_threshold": "mct",
    "magcache_k": "mck",
    "teacache_threshold": "tct",
}
FRACTIONS = {"magcache_retention_ratio"}  # options whose values are at most 1


def select_step_cache(
    options: StepCacheOptions, line: Mapping[str, Any]
) -> tuple[StepCaching | None, Mapping[str, float]]:
    """Return a video's step cache, and the prompt line's values that replace options.

    A line can only change a cache that the command line turned on; other values are ignored with a warning.

    Args:
        options: Options of the command line.
        line: Options of the prompt line, by name.

    Returns:
        The step cache, None if nothing is skipped or measured; and the line's used values by option.

    Raises:
        OptionError: If a value is out of range.
    """
    used_values = {}
    for name, short_name in SHORT_NAMES.items():
        value = line.get(name)
        if value is None:
            continue
        max_value = 1 if name in FRACTIONS else MAX_NUMBER
        if not 0 <= value <= max_value:
            raise OptionError(
                f"--{short_name} {format_number(value)}: pass 0 to {max_value:,}, as for --{name}"
            )
        # the option that turns TeaCache or MagCache on
        switch = "teacache_threshold" if name == "teacache_threshold" else "magcache_mag_ratios"
        if getattr(options, switch) is None:
            logger.warning("--%s %g is ignored because --%s is not given", short_name, value, switch)
        else:
            used_values[name] = value
    line_options: StepCacheOptions = replace(options, **used_values) if used_values else options
    return _make_step_cache(line_options), used_values


def _make_step_cache(options: StepCacheOptions) -> StepCaching | None:
    """Return the step cache that the options select; None if nothing is skipped or measured."""
    if options.magcache_calibration:
        return MagCalibration()
    if options.teacache_calibration:
        return TeaCalibration()
    if options.teacache_threshold:
        return TeaCache(options.teacache_threshold, options.teacache_coefficients)
    skips_passes = options.magcache_threshold and options.magcache_k  # nothing is skipped if one is 0
    # without measured ratios there is no basis for skipping
    if options.magcache_mag_ratios is not None and skips_passes:
        return MagCache(
            options.magcache_mag_ratios,
            options.magcache_retention_ratio,
            options.magcache_threshold,
            options.magcache_k,
        )
    return None


def check_step_cache(step_caching: StepCaching, prepared: Prepared, spec: DitSpec) -> None:
    """Raise OptionError if the chosen step caching does not fit the model or the request.

    Args:
        step_caching: The method, TeaCache or MagCache, or the calibration of one, which only measures.
        prepared: The request with all values resolved.
        spec: Description of the transformer.
    """
    if isinstance(step_caching, (TeaCache, TeaCalibration)) and spec.modulated_input is None:
        raise OptionError("TeaCache compares the modulated input of the first block, which this model lacks")
    if isinstance(step_caching, TeaCache) and not (step_caching.coefficients or spec.teacache_coefficients):
        raise OptionError(
            "--teacache_threshold needs --teacache_coefficients: none are published for this model. "
            "Calibrate first: run once with --teacache_calibration instead, which prints them"
        )
    if isinstance(step_caching, MagCalibration):
        _check_calibration("--magcache_calibration", prepared, min_steps=2)
    if isinstance(step_caching, TeaCalibration):
        _check_calibration("--teacache_calibration", prepared, min_steps=step_cache.MIN_STEPS)


def _check_calibration(option: str, prepared: Prepared, min_steps: int) -> None:
    """Raise OptionError if the request does not run all steps, or runs too few for a calibration."""
    source = prepared.request.source
    if source is not None and prepared.first_step:
        raise OptionError(
            f"{option} measures all steps from pure noise, and a video that starts from another one runs "
            f"only the last steps: omit --{source.option}"
        )
    if prepared.steps < min_steps:
        raise OptionError(
            f"{option} with {prepared.steps} steps: at least {min_steps} are needed. Use the number of steps "
            "that you will generate videos with"
        )


class StepCaches:
    """Step caches around the blocks of the networks that generate one video."""

    def __init__(self, prepared: Prepared, spec: DitSpec) -> None:
        """Set up the request's step cache: a rule for skipping passes, or a calibration that measures.

        Args:
            prepared: The request with all values resolved.
            spec: Names of the network's blocks.
        """
        self._settings = prepared.request.step_cache
        self._steps = prepared.steps
        self._make_rule: Callable[[], step_cache.Rule] | None = None
        self._calibration: step_cache.Ratios | step_cache.Changes | None = None
        self._num_passes = self._num_skipped = 0
        match self._settings:
            case MagCache(ratios, retention, threshold, max_skips):
                # ratios are for all steps, but a video that starts from a source runs only the last ones
                step_ratios = step_cache.resample(ratios, prepared.steps)[prepared.first_step :]
                self._make_rule = lambda: step_cache.MagCacheRule(
                    step_ratios, retention, threshold, max_skips
                )
            case TeaCache(threshold, coefficients):
                polynomial = coefficients or spec.teacache_coefficients
                self._make_rule = lambda: step_cache.TeaCacheRule(threshold, polynomial)
            case MagCalibration():
                self._calibration = step_cache.Ratios()
            case TeaCalibration():
                self._calibration = step_cache.Changes()

    @contextmanager
    def section(self, dit_at: DitAt) -> Iterator[DitAt]:
        """Yield a function like `dit_at`, whose networks use the step cache or are measured to calibrate it.

        `dit_at` returns the network for a timestep. At the end of the section, cached tensors are freed and
        the networks are restored.
        """
        if self._calibration is not None:
            measure_pass = functools.partial(step_cache.measure_pass, self._calibration.measure)
            try:
                with step_cache.run_around(dit_at, measure_pass) as measured_dit_at:
                    yield measured_dit_at
            finally:
                self._calibration.forget()
            return
        assert self._make_rule is not None
        cache = step_cache.StepCache(self._make_rule)
        try:
            with step_cache.run_around(dit_at, cache.run) as cached_dit_at:
                yield cached_dit_at
        finally:
            cache.forget()  # the yielded function still refers to the cache
        self._num_passes += cache.passes
        self._num_skipped += cache.skipped

    def report(self) -> None:
        """When the video's latents are finished, log the number of skipped passes or the calibration."""
        if self._calibration is None:
            name = "MagCache" if isinstance(self._settings, MagCache) else "TeaCache"
            logger.info("%s skipped %d of %d passes", name, self._num_skipped, self._num_passes)
        elif isinstance(self._calibration, step_cache.Ratios):
            ratios = " ".join(f"{ratio:.5f}" for ratio in self._calibration.result(self._steps))
            logger.info("MagCache's ratios for this model:\n  --magcache_mag_ratios %s", ratios)
        else:
            self._report_teacache_fit(self._calibration)

    def _report_teacache_fit(self, calibration: step_cache.Changes) -> None:
        """Log the coefficients fitted to the measured changes, or that there were too few measurements."""
        coefficients = calibration.result()
        if not coefficients:
            logger.warning("TeaCache's coefficients could not be fitted: the video ended after too few steps")
            return
        input_changes = [change for change, _ in calibration.points]
        logger.info(
            "TeaCache's coefficients for this model, fitted for changes of the input from %.3g to %.3g:\n"
            "  --teacache_coefficients %s",
            min(input_changes),
            max(input_changes),
            " ".join(f"{coefficient:.9g}" for coefficient in coefficients),
        )
