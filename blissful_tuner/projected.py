"""Adaptive projected guidance: what the difference of the passes has along the positive velocity is dropped.

Source: Sadat et al. 2024, arXiv 2410.02416; `modules.contract.guidance.Projection` says from which step on.
"""

import torch
from torch import Tensor

from blissful_tuner.guidance_passes import POSITIVE, GuidanceStage, Pass, Velocities
from modules.contract.guidance import Projection


class Momentum:
    """A running sum of the differences of the passes over the steps of one section."""

    def __init__(self, factor: float) -> None:
        """factor: of the sum so far when a difference is added."""
        self._factor = factor
        self._sum: Tensor | None = None

    def add(self, difference: Tensor) -> Tensor:
        """Add a difference, B C F H W, and return the new sum."""
        self._sum = difference if self._sum is None else difference + self._factor * self._sum
        return self._sum


def watched(stage: GuidanceStage, momentum: Momentum, negative: Pass) -> GuidanceStage:
    """Return a stage that also adds the difference of its passes to the momentum."""

    def change(velocity: Tensor, velocities: Velocities) -> Tensor:
        momentum.add(velocities[POSITIVE] - velocities[negative])
        return stage.change(velocity, velocities)

    return GuidanceStage(stage.passes, change)


def projected(rule: Projection, momentum: Momentum, negative: Pass) -> GuidanceStage:
    """Guide by the momentum, limited in length and without most of its part along the positive velocity.

    Each sample by itself.
    """

    def change(_: Tensor, velocities: Velocities) -> Tensor:
        positive, without = velocities[POSITIVE], velocities[negative]
        axes = tuple(range(1, positive.ndim))
        total = momentum.add(positive - without)
        length = total.square().sum(axes, keepdim=True).sqrt()
        step = total * (rule.norm_limit / length).clamp(max=1.0)
        along, across = _split(step, positive)
        return without + rule.scale * (across + rule.eta * along)

    return GuidanceStage((POSITIVE, negative), change)


def _split(vector: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Split B ... into its parts along and across a direction, each sample by itself."""
    # float64, as released: the part across is a small difference of large numbers; MPS has no float64
    exact = vector.dtype if vector.device.type == "mps" else torch.float64
    vector_exact, direction_exact = vector.to(exact), direction.to(exact)
    axes = tuple(range(1, vector.ndim))
    unit = direction_exact / direction_exact.square().sum(axes, keepdim=True).sqrt().clamp(min=1e-12)
    along = (vector_exact * unit).sum(axes, keepdim=True) * unit
    return along.to(vector.dtype), (vector_exact - along).to(vector.dtype)
