"""Video-to-video: start denoising from a noisy video, at a later step of the schedule."""

from torch import Tensor

from modules.flow.schedule import Schedule, add_noise


def noisy_source(source: Tensor, noise: Tensor, schedule: Schedule, step: int) -> Tensor:
    """Mix clean latents with noise, both B C F H W, as the schedule does at this step."""
    sigmas, alphas = (
        levels[step].float().expand(len(noise)).to(noise.device)
        for levels in (schedule.sigmas, schedule.alphas)
    )
    return add_noise(source.float(), noise, sigmas, alphas)
