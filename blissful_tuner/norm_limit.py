"""A limit on the size of a guided velocity, as Lumina-Image-2.0's release has it."""

import torch
from torch import Tensor

from blissful_tuner.guidance_passes import POSITIVE, GuidanceStage, Velocities


def limit_norm(limit: float) -> GuidanceStage:
    """`--renorm_cfg`: a guided velocity is at most so many times as large as the positive one.

    Sizes are Euclidean norms over everything but the batch; each sample by itself. Source: Qin et al. 2025,
    arXiv 2503.21758, section on inference.
    """

    def change(velocity: Tensor, velocities: Velocities) -> Tensor:
        axes = tuple(range(1, velocity.ndim))
        most = limit * torch.linalg.vector_norm(velocities[POSITIVE], dim=axes, keepdim=True)
        size = torch.linalg.vector_norm(velocity, dim=axes, keepdim=True)
        return torch.where(size > most, velocity * (most / size), velocity)

    return GuidanceStage((POSITIVE,), change)
