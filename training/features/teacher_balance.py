"""How --timestep_focus changes the fraction of draws that fall into a band of noise levels.

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
    """Weights that undo --timestep_focus for loss terms used only inside or outside a range of noise levels.

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
    noise_spec: NoiseSpec = FLOW,
    flow_shift: float = 1.0,
    expert: Expert = ONE_EXPERT[0],
) -> FocusBalance:
    """Return the factors that compensate for --timestep_focus inside and outside a band of noise levels.

    With --timestep_focus P, a level is drawn from the focus range with probability P, otherwise as without
    the option.

    1. Count draws in both cases: those that the expert is trained on, and those of them in the band.
    2. Mix the two counts by the probability of the focus.
    3. Divide the band's share of the trained draws without the focus by its share with the focus; likewise
       for the levels outside the band.

    Args:
        options: Options of the run.
        low: Lower end of the band, in thousandths, as noise in the trained sample.
        high: Upper end of the band, in the same unit.
        noise_spec: Noise conventions of the family.
        flow_shift: Shift for sampling timesteps, which may depend on the size of the batch.
        expert: Expert whose noise levels are trained, if not all are.
    """
    focus = options.timestep_focus
    if focus is None:
        return NO_FOCUS
    unfocused = _count_unfocused_draws(
        options, low, high, noise_spec=noise_spec, flow_shift=flow_shift, expert=expert
    )
    if not unfocused.trained:  # only draws from the focus range are trained
        return NO_FOCUS
    lowest, highest = expert.min_timestep, min(expert.max_timestep, NUM_TIMESTEPS)
    from_focus_range = _DrawFractions(
        in_band=_compute_focus_fraction(options, max(low, lowest), min(high, highest)),
        trained=_compute_focus_fraction(options, lowest, highest),
    )
    mixed = _DrawFractions(
        in_band=(1 - focus) * unfocused.in_band + focus * from_focus_range.in_band,
        trained=(1 - focus) * unfocused.trained + focus * from_focus_range.trained,
    )
    share_without_focus = unfocused.in_band / unfocused.trained
    share_with_focus = mixed.in_band / mixed.trained
    return FocusBalance(
        inside=_divide(share_without_focus, share_with_focus),
        outside=_divide(1 - share_without_focus, 1 - share_with_focus),
    )


@dataclass(frozen=True)
class _DrawFractions:
    """Which fraction of all drawn noise levels an expert is trained on, and which of them lie in the band."""

    in_band: float  # fraction of all draws that the expert is trained on and that lie in the band
    trained: float  # fraction of all draws that the expert is trained on


def _count_unfocused_draws(
    options: TimestepOptions,
    low: float,
    high: float,
    *,
    noise_spec: NoiseSpec,
    flow_shift: float,
    expert: Expert,
) -> _DrawFractions:
    """Return the fractions of draws in the band and in the expert's range without --timestep_focus."""
    fractions = sample_fractions(options, spread_evenly(), noise_spec, flow_shift)
    # ONE_EXPERT accepts all levels within the options' bounds; the expert's own range is compared below
    levels = NUM_TIMESTEPS * fractions[is_accepted(options, fractions, noise_spec, ONE_EXPERT[0])]
    is_trained = (levels >= expert.min_timestep) & (levels < expert.max_timestep)
    is_inside = is_trained & (levels >= low) & (levels <= high)
    return _DrawFractions(in_band=_mean(is_inside), trained=_mean(is_trained))


def _mean(fits: Tensor) -> float:
    return float(fits.double().mean())


def _compute_focus_fraction(options: TimestepOptions, low: float, high: float) -> float:
    """Return the fraction of --timestep_focus_range between `low` and `high`."""
    first, last = options.timestep_focus_range
    return max(0.0, min(high, last) - max(low, first)) / (last - first)


def _divide(unfocused: float, focused: float) -> float:
    """Return the ratio of two fractions; 1 if the second one is 0."""
    return 1.0 if math.isclose(focused, 0.0, abs_tol=1e-9) else unfocused / focused
