"""Perpendicular negative guidance: avoid only what the negative prompt does not share with the prompt.

Source: Armandpour et al. 2023, arXiv 2304.04968.
"""

import torch
from torch import Tensor

from blissful_tuner.guidance_passes import BLANK, POSITIVE, GuidanceStage, Pass, Velocities


def perp_neg(scale: float, weight: float, negative: Pass) -> GuidanceStage:
    """`--perp_neg`: guidance away from the empty prompt; of the negative direction only the part across the
    positive one counts, `weight` times. Each sample by itself. At a weight of 0 there is no negative pass.
    """

    def change(_: Tensor, velocities: Velocities) -> Tensor:
        blank = velocities[BLANK]
        wanted = velocities[POSITIVE] - blank
        if weight == 0:
            return blank + scale * wanted
        unwanted = velocities[negative] - blank
        axes = tuple(range(1, blank.ndim))
        # where the prompt changes nothing, the length is 0 and so is the product
        length = wanted.square().sum(axes, keepdim=True).clamp_min(torch.finfo(wanted.dtype).tiny)
        along = (unwanted * wanted).sum(axes, keepdim=True) / length * wanted
        return blank + scale * (wanted - weight * (unwanted - along))

    return GuidanceStage((POSITIVE, *(() if weight == 0 else (negative,)), BLANK), change)
