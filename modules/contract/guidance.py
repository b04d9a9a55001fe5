"""Rules of a model's guidance beside the formula, as in its release."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Projection:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416), from a step on."""

    after_step: int  # the last step, from 0, that is guided by the plain formula
    scale: float  # in place of the guidance scale
    momentum: float  # of the average of differences; negative: the change of direction counts
    norm_limit: float  # of a difference, over all but the batch
    eta: float = 0.0  # share of the part along the positive velocity
    rescale: float = 0.0  # in place of --guidance_rescale


@dataclass(frozen=True)
class GuidanceRules:
    """The rules of one request; the shared guidance applies them."""

    # guidance only while the share of data, 1 - sigma, is below it; later the positive pass alone
    below_share: float | None = None
    # largest norm of a guided velocity, in norms of the positive one; None: no limit
    norm_limit: float | None = None
    projection: Projection | None = None


AS_PLAIN = GuidanceRules()
