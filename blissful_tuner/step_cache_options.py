"""Options of step caches, which skip passes that resemble those before. Standard library only."""

import logging

from modules.errors import OptionError
from modules.options import NO_PIXELS, Options, option

logger = logging.getLogger(__name__)

RETENTION, THRESHOLD, MOST_SKIPS = 0.2, 0.24, 6  # usual values of --magcache_...
MOST_RATIO = 100  # a larger one is a slip of the finger
MOST_COEFFICIENTS = 16
NOTHING_SKIPPED = "0 skips nothing"


class StepCacheOptions(Options, title="step caches: skip passes that resemble those before"):
    """Which step cache to use; `blissful_tuner.step_cache.choose_step_cache` adds a prompt line's values."""

    magcache_mag_ratios: tuple[float, ...] | None = option(  # None: no MagCache
        "skip by MagCache, with these ratios as --magcache_calibration prints them; they are resampled to "
        "the number of steps",
        metavar="RATIO",
    )
    magcache_retention_ratio: float = option(
        f"share of the steps at the start of which none is skipped; default {RETENTION:g}",
        default=RETENTION,
        least=0,
        most=1,
    )
    magcache_threshold: float = option(
        "largest error of passes skipped in a row: higher is faster and further from the plain video; "
        f"default {THRESHOLD:g}",
        default=THRESHOLD,
        least=0,
        hint=NOTHING_SKIPPED,
    )
    magcache_k: int = option(
        f"largest number of passes skipped in a row; default {MOST_SKIPS}",
        default=MOST_SKIPS,
        least=0,
        hint=NOTHING_SKIPPED,
    )
    magcache_calibration: bool = option(
        "skip nothing, and print --magcache_mag_ratios as measured", facts=NO_PIXELS
    )
    teacache_threshold: float | None = option(  # None and 0: no TeaCache
        "skip by TeaCache until the predicted change reaches this: 0.1 to 0.15 with the published "
        "coefficients; higher is faster and further from the plain video",
        least=0,
        hint=NOTHING_SKIPPED,
    )
    teacache_coefficients: tuple[float, ...] | None = option(
        "polynomial that predicts the change, highest power first; default: the model's published one, if "
        "any",
        nargs="+",
        metavar="NUMBER",
    )
    teacache_calibration: bool = option(
        "skip nothing, and print --teacache_coefficients as fitted", facts=NO_PIXELS
    )

    def __post_init__(self) -> None:
        given = {
            "--magcache_mag_ratios": self.magcache_mag_ratios is not None,
            "--magcache_calibration": self.magcache_calibration,
            "--teacache_threshold": self.teacache_threshold is not None,
            "--teacache_calibration": self.teacache_calibration,
        }
        both = [option for option, is_given in given.items() if is_given]
        if len(both) > 1:
            why = (
                "a calibration computes every step, a cache skips some"
                if any("calibration" in option for option in both)
                else "MagCache and TeaCache both decide which steps are skipped"
            )
            raise OptionError(f"{' and '.join(both)} cannot be used together: {why}. Give one of them")
        if self.magcache_mag_ratios is not None:
            self._check_ratios(self.magcache_mag_ratios)
        self._check_numbers()
        self._tell_unused()

    def _check_ratios(self, ratios: tuple[float, ...]) -> None:
        if ratios in {(), (0.0,)}:
            raise OptionError(
                "--magcache_mag_ratios 0 means built-in ratios, and there are none for this model: calibrate "
                "first. Run the command once with --magcache_calibration in its place, which prints the "
                "option to give"
            )
        for ratio in ratios:
            if not 0 < ratio <= MOST_RATIO:
                raise OptionError(
                    f"--magcache_mag_ratios {ratio:g}: give numbers above 0, one for each step of the "
                    "calibration, as --magcache_calibration prints them"
                )

    def _check_numbers(self) -> None:
        count = 1 if self.teacache_coefficients is None else len(self.teacache_coefficients)
        if not 1 <= count <= MOST_COEFFICIENTS:
            raise OptionError(
                f"--teacache_coefficients: give 1 to {MOST_COEFFICIENTS} numbers, highest power first, as "
                "--teacache_calibration prints them"
            )

    def _tell_unused(self) -> None:
        if self.magcache_mag_ratios is None:
            usual = {
                "--magcache_retention_ratio": (self.magcache_retention_ratio, RETENTION),
                "--magcache_threshold": (self.magcache_threshold, THRESHOLD),
                "--magcache_k": (self.magcache_k, MOST_SKIPS),
            }
            for option, (value, default) in usual.items():
                if value != default:
                    logger.warning(
                        "%s %g is ignored because --magcache_mag_ratios is not given", option, value
                    )
        if self.teacache_coefficients is not None and self.teacache_threshold is None:
            logger.warning("--teacache_coefficients is ignored because --teacache_threshold is not given")
