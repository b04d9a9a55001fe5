"""A request for Wan: its size and flow shift, the images and videos that a task takes, their encoding."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from modules.contract.data import Conditions, LatentSpec, MediaEncoders, SamplingDefaults
from modules.contract.family import NoiseSource
from modules.contract.requests import (
    Prepared,
    Request,
    check_size,
    keep_usable_media,
    settle,
    size_of,
    whole_frames,
)
from modules.contract.rules import Expert
from modules.errors import OptionError
from modules.media.pixels import image_pixels, image_size, read_pixels, video_pixels
from modules.option_values import require
from wan import conditioning
from wan.configs import FIRST_LAST_NEGATIVE_PROMPT, NEGATIVE_PROMPT, WanTask, default_flow_shift
from wan.spec import LATENT

FIRST_LATENTS = "first_latents"  # condition: clean latents of an image, B C 1 h w, the first of the video


def appends_end(task: WanTask, request: Request) -> bool:
    """Whether an end image adds a latent frame (image-to-video of Wan2.1), or lies inside the clip."""
    return task.appends_end and request.end_image_path is not None


def take_inputs(task: WanTask, request: Request) -> Request:
    """Return the request with the media that the task takes. Raises OptionError if one is missing."""
    if task.takes_image:
        require(request.first_image, "--image_path", f"--task {task.name} starts from an image")
    if task.kind == "flf2v":
        require(request.end_image_path, "--end_image_path", f"--task {task.name} ends with an image")
    if task.has_control:
        require(request.control_path, "--control_path", f"--task {task.name} follows a control video")
    taken = {
        "image_path": task.takes_image or task.keeps_image,
        "end_image_path": task.takes_image,
        "control_path": task.has_control,
    }
    return keep_usable_media(request, taken, f"--task {task.name} does not take it")


def encode_inputs(
    encoders: MediaEncoders, prepared: Prepared, task: WanTask, stretched: bool
) -> dict[str, Tensor | list[Tensor]]:
    """Encode a request's images and control video as CLIP features and condition channels, on the CPU.

    stretched: images are stretched to the size, which has their aspect; else cropped.
    """
    request, width, height, frames = prepared.asked, prepared.width, prepared.height, prepared.frames
    vae = encoders.vae
    conditions: dict[str, Tensor | list[Tensor]] = {}
    image: Tensor | None = None
    end = request.end_image_path

    def pixels(path: Path) -> Tensor:
        return image_pixels(path, width, height, keep_aspect=not stretched)

    first = request.first_image
    if task.takes_image and first is not None:
        if task.has_features:
            paths = [first] + ([end] if task.kind == "flf2v" and end is not None else [])
            features = [encoders.image_encoder.encode(read_pixels(path)[:, :, 0]) for path in paths]
            conditions["clip"] = torch.cat(features, dim=1).cpu()
        if end is not None and not task.appends_end:
            image = conditioning.first_last_condition(vae, pixels(first), pixels(end), frames)
        else:
            image = conditioning.image_condition(vae, pixels(first), frames, pixels(end) if end else None)
        conditions["condition_latents"] = image.cpu()
    if task.keeps_image and request.image_path is not None:
        pixels_in_front = image_pixels(request.image_path, width, height, shrink="lanczos")
        conditions[FIRST_LATENTS] = vae.encode(pixels_in_front).cpu()
    if task.has_control and request.control_path is not None:
        has_end = appends_end(task, request)
        end_frames = conditioning.FRAMES_PER_LATENT if has_end else 0
        control = vae.encode(
            video_pixels(request.control_path, "--control_path", width, height, frames, end_frames)
        )
        conditions["condition_latents"] = control_channels(task, control, image, has_end).cpu()
    return conditions


def control_channels(task: WanTask, control: Tensor, image: Tensor | None, has_end: bool = False) -> Tensor:
    """Return the condition channels of a Fun-Control model, B C L h w.

    control: latents of the control video. image: channels of the start image with their mask. has_end: it has
    an end image as its last frame.
    """
    if task.version == "2.2":
        return conditioning.masked_control_condition(control, image)
    start = None if image is None else image[:, -LATENT.channels :]
    return conditioning.control_condition(control, start, has_end)


def add_image_noise(conditions: Conditions, amount: float, noise: NoiseSource) -> dict[str, Tensor]:
    """Return the condition channels with noise on those of the image, for more motion.

    It is drawn for all channels so that seeds give the noise of existing tools; added to those of the image
    only.
    """
    extra = conditions["condition_latents"]
    assert isinstance(extra, Tensor)
    drawn = noise.draw(extra.shape)[:, -LATENT.channels :].to(extra)
    noisy = extra[:, -LATENT.channels :] + amount * drawn
    return {"condition_latents": torch.cat([extra[:, : -LATENT.channels], noisy], dim=1)}


def prepare_request(
    task: WanTask,
    request: Request,
    usual: SamplingDefaults,
    latent: LatentSpec,
    experts: Sequence[Expert],
    follows_image: bool,
) -> Prepared:
    """Fill open fields of the request, settle the size, and check both.

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
