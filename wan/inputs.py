"""The images and videos of a request for Wan: which of them a task takes, and how they are encoded."""

from pathlib import Path

import torch
from torch import Tensor

from modules.contract.data import Conditions, MediaEncoders
from modules.contract.family import NoiseSource
from modules.contract.generation import Request
from modules.contract.prepared import Prepared
from modules.contract.requests import keep_usable_media
from modules.media.pixels import image_pixels, read_pixels, video_pixels
from modules.option_values import require
from wan import conditioning
from wan.configs import WanTask
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
