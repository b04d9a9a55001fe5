"""Rescaling: undo a share of the increase that guidance causes in the velocity's standard deviation."""

from torch import Tensor

from blissful_tuner.guidance_passes import POSITIVE, GuidanceStage, Velocities


def rescale(share: float) -> GuidanceStage:
    """`--guidance_rescale`, 0 to 1: against overexposed, too contrasty pictures. Each sample by itself.

    Source: Lin et al. 2023, arXiv 2305.08891, section 3.4.
    """

    def change(velocity: Tensor, velocities: Velocities) -> Tensor:
        axes = tuple(range(1, velocity.ndim))
        factor = velocities[POSITIVE].std(axes, keepdim=True) / velocity.std(axes, keepdim=True)
        return velocity * (share * factor + (1 - share))

    return GuidanceStage((POSITIVE,), change)
