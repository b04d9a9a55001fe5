"""Video-to-video: denoising begins with a video under noise, at a later step of the schedule."""

from torch import Tensor

from modules.flow.schedule import Schedule, add_noise


def noisy_source(source: Tensor, noise: Tensor, schedule: Schedule, step: int) -> Tensor:
    """What denoising begins with at that step: clean latents and noise, both B C F H W, as the schedule mixes
    them there.
    """
    sigmas, alphas = (
        levels[step].float().expand(len(noise)).to(noise.device)
        for levels in (schedule.sigmas, schedule.alphas)
    )
    return add_noise(source.float(), noise, sigmas, alphas)
