"""Normalised attention guidance: steer attention to the prompt away from attention to another text.

It takes the place of a second pass in models that run without classifier-free guidance, and works beside it.
A family computes the attention to both texts and calls `steer`; only the pass of the positive prompt has it.
Source: Chen et al. 2025, arXiv 2505.21179.
"""
# Letters: B batch, L tokens, N heads, D head width

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from blissful_tuner.nag_options import NagOptions
from modules.contract.steps import NO_TWEAKS, Away, Section, Tweaks


@dataclass(frozen=True)
class NormalisedGuidance:
    """The formula, as `Away.steer`. Equal to another with the same numbers: compiled code serves both."""

    scale: float
    tau: float
    alpha: float

    def __call__(self, toward: Tensor, away: Tensor) -> Tensor:
        """Combine the attention to the prompt and to the other text, both B L N D, in their dtype.

        guided = scale * toward - (scale - 1) * away, made at most `tau` times as large as `toward`, and
        blended: alpha * guided + (1 - alpha) * toward. Sizes are sums of absolute values over all heads of a
        token.
        """
        guided = torch.lerp(away, toward, self.scale)  # rounded once: large terms almost cancel in it
        allowed = self.tau * _size(toward) / _size(guided).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.lerp(toward, guided * allowed.clamp(max=1).to(guided.dtype), self.alpha)


def _size(seen: Tensor) -> Tensor:
    """Return B L 1 1 float32."""
    return torch.linalg.vector_norm(seen, 1, dim=(-2, -1), keepdim=True, dtype=torch.float32)


def nag_tweaks(options: NagOptions) -> Callable[[Section], Tweaks]:
    """Return a function that makes the tweaks of a section's positive passes; none if the guidance is off.

    Call it once for each section, whose conditions are on the device by then.
    """

    def of(section: Section) -> Tweaks:
        if not options.is_on:
            return NO_TWEAKS
        assert section.away is not None, "`needs` asks for the text"
        assert options.nag_scale is not None
        steer = NormalisedGuidance(options.nag_scale, options.nag_tau, options.nag_alpha)
        return Tweaks(away=Away(section.away, steer))

    return of
