"""Settle a request for Wan: its size, its flow shift, and what the task cannot make."""

from collections.abc import Sequence
from dataclasses import replace

from modules.contract.experts import Expert
from modules.contract.family import LatentSpec, SamplingDefaults
from modules.contract.generation import Request
from modules.contract.prepared import Prepared
from modules.contract.requests import check_size, settle, size_of, whole_frames
from modules.errors import OptionError
from modules.media.pixels import image_size
from wan import conditioning
from wan.configs import FIRST_LAST_NEGATIVE_PROMPT, NEGATIVE_PROMPT, WanTask, default_flow_shift


def prepare_request(
    task: WanTask,
    request: Request,
    usual: SamplingDefaults,
    latent: LatentSpec,
    experts: Sequence[Expert],
    follows_image: bool,
) -> Prepared:
    """Fill what the request leaves open, settle the size, and check both.

    request: with the media that the task takes, see `wan.inputs.take_inputs`. follows_image: the video takes
    the aspect of the image that it starts from. Raises OptionError if a size cannot be made.
    """
    width, height, frames = size_of(request, usual)
    if task.frames == 1 and frames != 1:
        raise OptionError(
            f"--video_length {frames}: --task {task.name} makes one image. Leave it out, or use a t2v task."
        )
    flow_shift = default_flow_shift(task, width, height) if request.flow_shift is None else request.flow_shift
    if follows_image:
        width, height = _size_by_image(task, request, width, height, latent)
    size = width, height, whole_frames(frames, latent)
    if task.keeps_image and request.image_path is not None and size[2] == 1:
        raise OptionError(
            f"--image_path {request.image_path}: it becomes the first frame, and the video has only one. "
            "Give a --video_length of 5 or more, or leave the image out"
        )
    check_size((width, height, frames), latent)
    usual_negative = FIRST_LAST_NEGATIVE_PROMPT if task.kind == "flf2v" else NEGATIVE_PROMPT
    # the release has no empty one
    request = replace(request, negative_prompt=request.negative_prompt or None)
    return settle(request, usual, size, flow_shift, usual_negative, experts)


def _size_by_image(
    task: WanTask, request: Request, width: int, height: int, latent: LatentSpec
) -> tuple[int, int]:
    """Return width and height with the aspect of the image that the task starts from, if there is one."""
    if task.takes_image and request.first_image is not None:
        return conditioning.size_like_image(image_size(request.first_image), width * height)
    if task.keeps_image and request.image_path is not None:
        return conditioning.nearest_size(image_size(request.image_path), width * height, latent.pixel_step)
    return width, height
