"""How --timestep_focus changes the fraction of the draws that fall into a band of noise levels.

With a focus, a loss term that acts only in a band would have less or more influence, because fewer or more
draws fall into the band. `find_balance` returns factors that compensate for this.
"""

import functools
import math
from dataclasses import dataclass

from torch import Tensor

from protocols.family import FLOW, NoiseSpec
from protocols.rules import ONE_EXPERT, Expert
from training.data.timesteps import is_accepted, sample_fractions, spread_evenly
from training.noise_options import NUM_TIMESTEPS, TimestepOptions


@dataclass(frozen=True)
class FocusBalance:
    """Weights that undo --timestep_focus for loss terms restricted to the inside or outside of a band.

    Each weight is the fraction of noise levels drawn in its region without the focus, divided by the fraction
    with the focus. It is 1 without a focus, or if the focus draws nothing in the region.
    """

    inside: float = 1.0
    outside: float = 1.0


NO_FOCUS = FocusBalance()


@functools.cache
def find_balance(
    options: TimestepOptions,
    low: float,
    high: float,
    *,
    noise: NoiseSpec = FLOW,
    flow_shift: float = 1.0,
    expert: Expert = ONE_EXPERT[0],
) -> FocusBalance:
    """Return the factors that compensate for --timestep_focus inside and outside of a band of noise levels.

    With the sampler `uniform`, a band from 0 to M (as fractions) and a focus P on L to H, `outside` is (1 -
    M) / ((1 - P) (1 - M) + P overlap / (H - L)), where overlap is the part of M to 1 within L to H. Fractions
    of other samplers are counted with a precision of 1 / 10,000.

    Args:
        options: Options of the run.
        low: Lower end of the band, in thousandths of noise of the sample as it is trained.
        high: Upper end of the band, in the same unit.
        noise: Noise conventions of the family.
        flow_shift: Shift for sampling timesteps, which may depend on the size of the batch.
        expert: Expert whose noise levels are trained, if not all are.
    """
    focus = options.timestep_focus
    if focus is None:
        return NO_FOCUS
    lowest, highest = expert.lowest, min(expert.highest, NUM_TIMESTEPS)
    unfocused = _compute_default_fractions(
        options, low, high, noise=noise, flow_shift=flow_shift, expert=expert
    )
    in_range = _BandFractions(
        inside=_fraction_of_range(options, max(low, lowest), min(high, highest)),
        trained=_fraction_of_range(options, lowest, highest),
    )
    focused = _BandFractions(
        inside=(1 - focus) * unfocused.inside + focus * in_range.inside,
        trained=(1 - focus) * unfocused.trained + focus * in_range.trained,
    )
    if not unfocused.trained:  # only draws of the focus are trained
        return NO_FOCUS
    before, after = unfocused.inside / unfocused.trained, focused.inside / focused.trained
    return FocusBalance(inside=_ratio(before, after), outside=_ratio(1 - before, 1 - after))


@dataclass(frozen=True)
class _BandFractions:
    """Shares of all draws of noise levels: in the band of the teacher, and in the range that is trained."""

    inside: float  # trained draws in the band
    trained: float  # draws at the noise levels of the expert


def _compute_default_fractions(
    options: TimestepOptions, low: float, high: float, *, noise: NoiseSpec, flow_shift: float, expert: Expert
) -> _BandFractions:
    """Return the fractions of draws in the band and in the expert's range without --timestep_focus."""
    fractions = sample_fractions(options, spread_evenly(), noise, flow_shift)
    levels = NUM_TIMESTEPS * fractions[is_accepted(options, fractions, noise, ONE_EXPERT[0])]
    is_trained = (levels >= expert.lowest) & (levels < expert.highest)
    is_inside = is_trained & (levels >= low) & (levels <= high)
    return _BandFractions(inside=_mean(is_inside), trained=_mean(is_trained))


def _mean(fits: Tensor) -> float:
    return float(fits.double().mean())


def _fraction_of_range(options: TimestepOptions, low: float, high: float) -> float:
    """Return the fraction of --timestep_focus_range between `low` and `high`."""
    first, last = options.timestep_focus_range
    return max(0.0, min(high, last) - max(low, first)) / (last - first)


def _ratio(usual: float, focused: float) -> float:
    return 1.0 if math.isclose(focused, 0.0, abs_tol=1e-9) else usual / focused
