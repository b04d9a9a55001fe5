"""Video-to-video: denoising begins with a video under noise, at a later step of the schedule."""

from torch import Tensor

from blissful_tuner.options import STRENGTH
from modules.contract.generation import Request
from modules.flow.schedule import Schedule, add_noise


def steps_to_make(request: Request) -> int:
    """How many of a prepared request's steps are made: all from noise; from a video the last ones, and at
    least one.
    """
    assert request.steps is not None
    if request.video_path is None:
        return request.steps
    strength = STRENGTH if request.strength is None else request.strength
    return min(max(int(request.steps * strength), 1), request.steps)


def noisy_source(source: Tensor, noise: Tensor, schedule: Schedule, step: int) -> Tensor:
    """What denoising begins with at that step: clean latents and noise, both B C F H W, as the schedule mixes
    them there.
    """
    sigmas, alphas = (
        levels[step].float().expand(len(noise)).to(noise.device)
        for levels in (schedule.sigmas, schedule.alphas)
    )
    return add_noise(source.float(), noise, sigmas, alphas)
