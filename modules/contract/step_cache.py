"""How the passes of a video that resemble the ones before are skipped: the records a request carries.

Standard library only.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class MagCache:
    """Skip passes while the size of the blocks' residual is known to change little."""

    # size of what the blocks add, against the step before; resampled to the number of steps
    ratios: tuple[float, ...]
    retention: float  # share of the steps at the start of which none is skipped
    threshold: float  # largest sum of errors over the passes skipped in a row
    most_skips: int  # in a row


@dataclass(frozen=True)
class TeaCache:
    """Skip passes while the input of the first block has changed little since the last one computed."""

    threshold: float  # at which the sum of predicted changes makes the next pass computed
    # polynomial from change of the input to change of the output, highest power first; None: the family's
    coefficients: tuple[float, ...] | None


@dataclass(frozen=True)
class MagCalibration:
    """Skip nothing, measure the ratios of `MagCache`."""


@dataclass(frozen=True)
class TeaCalibration:
    """Skip nothing, fit the coefficients of `TeaCache`."""


StepCaching = MagCache | TeaCache | MagCalibration | TeaCalibration
