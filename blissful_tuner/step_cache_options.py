"""Options of step caches, which skip passes that resemble those before. Standard library only."""

import argparse
import logging
from dataclasses import dataclass, field

from modules.errors import OptionError
from modules.option_values import check_at_least
from modules.options import NO_PIXELS

logger = logging.getLogger(__name__)

RETENTION, THRESHOLD, MOST_SKIPS = 0.2, 0.24, 6  # usual values of --magcache_...
MOST_RATIO = 100  # a larger one is a slip of the finger
MOST_COEFFICIENTS = 16


@dataclass(frozen=True)
class StepCacheOptions:
    """Which step cache to use; `blissful_tuner.step_cache.choose_step_cache` adds a prompt line's values."""

    magcache_mag_ratios: tuple[float, ...] | None  # None: no MagCache
    magcache_retention_ratio: float  # share of the steps at the start of which none is skipped
    magcache_threshold: float  # 0: nothing is skipped
    magcache_k: int  # most passes skipped in a row
    magcache_calibration: bool = field(metadata=NO_PIXELS)
    teacache_threshold: float | None  # None and 0: no TeaCache
    teacache_coefficients: tuple[float, ...] | None  # None: those of the family
    teacache_calibration: bool = field(metadata=NO_PIXELS)

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
        share = self.magcache_retention_ratio
        if not 0 <= share <= 1:  # nan too
            raise OptionError(f"--magcache_retention_ratio {share:g}: give a share of the steps from 0 to 1")
        check_at_least("--magcache_threshold", self.magcache_threshold, 0, "give 0 to skip nothing")
        check_at_least("--magcache_k", self.magcache_k, 0, "give 0 to skip nothing")
        check_at_least("--teacache_threshold", self.teacache_threshold, 0, "give 0 to skip nothing")
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


def add_step_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `StepCacheOptions`."""
    group = parser.add_argument_group("step caches: skip passes that resemble those before")
    group.add_argument(
        "--magcache_mag_ratios",
        type=float,
        nargs="*",
        default=None,
        metavar="RATIO",
        help="skip by MagCache, with these ratios as --magcache_calibration prints them; they are resampled "
        "to the number of steps",
    )
    group.add_argument(
        "--magcache_retention_ratio",
        type=float,
        default=RETENTION,
        help=f"share of the steps at the start of which none is skipped; default {RETENTION:g}",
    )
    group.add_argument(
        "--magcache_threshold",
        type=float,
        default=THRESHOLD,
        help=f"largest error of passes skipped in a row: higher is faster and further from the plain video; "
        f"default {THRESHOLD:g}",
    )
    group.add_argument(
        "--magcache_k",
        type=int,
        default=MOST_SKIPS,
        help=f"largest number of passes skipped in a row; default {MOST_SKIPS}",
    )
    group.add_argument(
        "--magcache_calibration",
        action="store_true",
        help="skip nothing, and print --magcache_mag_ratios as measured",
    )
    group.add_argument(
        "--teacache_threshold",
        type=float,
        default=None,
        help="skip by TeaCache until the predicted change reaches this: 0.1 to 0.15 with the published "
        "coefficients; higher is faster and further from the plain video",
    )
    group.add_argument(
        "--teacache_coefficients",
        type=float,
        nargs="+",
        default=None,
        metavar="NUMBER",
        help="polynomial that predicts the change, highest power first; default: the model's published one, "
        "if any",
    )
    group.add_argument(
        "--teacache_calibration",
        action="store_true",
        help="skip nothing, and print --teacache_coefficients as fitted",
    )
