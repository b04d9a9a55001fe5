"""Video-to-video: start denoising from a noisy video, at a later step of the schedule."""

from torch import Tensor

from blissful_tuner.options import STRENGTH
from modules.contract.generation import Request
from modules.flow.schedule import Schedule, add_noise


def steps_to_make(request: Request) -> int:
    """Return how many of a prepared request's steps are made: all from noise, the last ones from a video.

    At least one.
    """
    assert request.steps is not None
    if request.video_path is None:
        return request.steps
    strength = STRENGTH if request.strength is None else request.strength
    return min(max(int(request.steps * strength), 1), request.steps)


def noisy_source(source: Tensor, noise: Tensor, schedule: Schedule, step: int) -> Tensor:
    """Mix clean latents with noise, both B C F H W, as the schedule does at this step."""
    return add_noise(source.float(), noise, schedule.sigmas[step].expand(len(noise)).to(noise.device))
