"""A request for Wan: its size and flow shift, and its images and videos as conditions of the transformer.

Image-to-video models take 20 more channels: 4 of a mask (1 if the latent frame is known) and 16 of the
latents of the known frames, with mid-gray for the others. Fun-Control models of Wan2.1 take 32: 16 of the
control video's latents and 16 of the start image's, without a mask; those of Wan2.2 take 36, the image's with
its mask. Source: the released Wan2.1 code (Wan team 2025, arXiv 2503.20314, section 5) and VideoX-Fun for
Fun-Control.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from modules.errors import OptionError
from modules.media.pixels import image_pixels, image_size, read_pixels, video_pixels
from modules.option_values import require
from protocols.data import LatentSpec, MediaEncoders, SamplingDefaults
from protocols.requests import (
    Prepared,
    Request,
    check_frames,
    check_size,
    full_frames,
    get_size,
    keep_usable_media,
    resolve_request,
)
from protocols.rules import Expert
from wan.configs import FIRST_LAST_NEGATIVE_PROMPT, NEGATIVE_PROMPT, WanTask, default_flow_shift
from wan.spec import LATENT
from wan.vae import WanVae

FRAMES_PER_LATENT = 4  # so the mask has 4 channels
SIZE_STEP = 16  # pixels: VAE stride 8, patch 2


def size_like_image(image: tuple[int, int], area: int) -> tuple[int, int]:
    """Return a size with the image's aspect ratio and about `area` pixels, floored to multiples of 16.

    Sizes are (width, height). Source: the released image-to-video code, which floors latent sides to
    multiples of the patch.
    """
    aspect = image[1] / image[0]
    # add a little because the root of an exact square may come out just below it
    width = (area / aspect) ** 0.5 + 1e-6
    height = (area * aspect) ** 0.5 + 1e-6
    return _round_side(width, SIZE_STEP), _round_side(height, SIZE_STEP)


def _round_side(side: float, step: int) -> int:
    """Return the largest multiple of `step` that is not above `side`, but at least one step."""
    return max(int(side // step) * step, step)


def nearest_size(image: tuple[int, int], area: int, step: int) -> tuple[int, int]:
    """Return a size of at most `area` pixels, in multiples of `step`, near the image's aspect ratio.

    Two candidates (width, height) are computed: one side is rounded down first, and the other side is as long
    as the area then allows. The candidate with the nearer aspect ratio is returned. Source: the released code
    of TI2V-5B.
    """
    aspect = image[0] / image[1]
    # 1e-6: the root of an exact square may come out just below it
    width = _round_side((area * aspect) ** 0.5 + 1e-6, step)
    height = _round_side((area * (1 / aspect)) ** 0.5 + 1e-6, step)
    sizes = [
        (width, _round_side(area // width, step)),
        (_round_side(area // height, step), height),
    ]

    def stretch(size: tuple[int, int]) -> float:
        """Return the factor between a size's aspect ratio and the image's, at least 1.0."""
        ratio = size[0] / size[1] / aspect
        return max(ratio, 1 / ratio)

    # rounding up to one step may exceed the area; if both sizes do, take the nearer one anyway
    fitting = [size for size in sizes if size[0] * size[1] <= area] or sizes
    # on a tie the release takes the size whose height was rounded first. `min` returns the first of equal
    # items, so the list is reversed
    return min(reversed(fitting), key=stretch)


def frame_mask(known_frames: Tensor) -> Tensor:
    """Turn the known pixel frames (F, 0 or 1) into a mask, 4 L.

    The first frame is repeated four times. Then each group of four frames becomes the channels of a latent
    frame.
    """
    repeated = torch.cat([known_frames[:1].repeat(FRAMES_PER_LATENT), known_frames[1:]])
    return rearrange(repeated, "(l c) -> c l", c=FRAMES_PER_LATENT)


def image_condition(vae: WanVae, image: Tensor, frames: int, end_image: Tensor | None = None) -> Tensor:
    """Return the condition of image-to-video, B 20 L h w float32: a mask of 4 channels, then 16 of latents.

    Args:
        vae: The VAE.
        image: First frame, B 3 1 H W in -1..1.
        frames: Number of pixel frames.
        end_image: Last frame, like `image`. It is encoded alone and appended as one more latent frame.
    """
    # gray frames, 0 in -1..1, follow the image
    clip = torch.cat([image, image.new_zeros(*image.shape[:2], frames - 1, *image.shape[3:])], dim=2)
    latents = vae.encode(clip)
    known_frames = torch.zeros(frames)
    known_frames[0] = 1
    mask = frame_mask(known_frames)
    if end_image is not None:
        latents = torch.cat([latents, vae.encode(end_image)], dim=2)
        mask = torch.cat([mask, torch.ones(FRAMES_PER_LATENT, 1)], dim=1)
    return _with_mask(mask, latents)


def first_last_condition(vae: WanVae, first: Tensor, last: Tensor, frames: int) -> Tensor:
    """Return the condition of first-and-last-frame models, B 20 L h w float32.

    Both images, B 3 1 H W, are encoded in one clip of `frames` frames.
    """
    if frames == 1:
        return image_condition(vae, first, 1)
    middle = first.new_zeros(*first.shape[:2], frames - 2, *first.shape[3:])
    latents = vae.encode(torch.cat([first, middle, last], dim=2))
    known_frames = torch.zeros(frames)
    known_frames[0] = known_frames[-1] = 1
    return _with_mask(frame_mask(known_frames), latents)


def _with_mask(mask: Tensor, latents: Tensor) -> Tensor:
    batch, _, _, height, width = latents.shape
    spread = mask.to(latents)[None, :, :, None, None].expand((batch, -1, -1, height, width))
    return torch.cat([spread, latents], dim=1)


FIRST_LATENTS = "first_latents"  # condition: clean latents of an image, B C 1 h w, the first of the video


def appends_end(task: WanTask, request: Request) -> bool:
    """Return whether an end image becomes one more latent frame; otherwise it is the clip's last frame."""
    return task.kind == "i2v" and task.version == "2.1" and request.end_image_path is not None


def keep_task_media(task: WanTask, request: Request) -> Request:
    """Return the request with only the media that the task takes. Raises OptionError if one is missing."""
    if task.requires_image:
        require(request.first_image, "--image_path", f"--task {task.name} starts from an image")
    if task.kind == "flf2v":
        require(request.end_image_path, "--end_image_path", f"--task {task.name} ends with an image")
    if task.has_control:
        require(request.control_path, "--control_path", f"--task {task.name} follows a control video")
    usable = {
        "image_path": task.requires_image or task.takes_clean_first_frame,
        "end_image_path": task.requires_image,
        "control_path": task.has_control or task.takes_references,
        "control_images": task.takes_references,
    }
    return keep_usable_media(request, usable, f"--task {task.name} does not take it")


def check_control(task: WanTask, prepared: Prepared, path: Path) -> None:
    """Raise MediaError if a control video has too few frames, before any model is loaded."""
    option = "--src_video" if task.takes_references else "--control_path"
    end_frames = int(task.has_control and appends_end(task, prepared.request))
    check_frames(option, path, prepared.frames + end_frames)


def encode_inputs(
    encoders: MediaEncoders, prepared: Prepared, task: WanTask
) -> dict[str, Tensor | list[Tensor]]:
    """Encode a request's images and control video as CLIP features and condition channels, on the CPU.

    Images are stretched to the output size, which has the aspect ratio of the first one.
    """
    request = prepared.request
    vae = encoders.vae
    conditions: dict[str, Tensor | list[Tensor]] = {}
    image: Tensor | None = None
    if task.requires_image and request.first_image is not None:
        if task.uses_clip_features:
            # The CLIP features of the first image and, for first-and-last-frame models, of the end image
            paths = [request.first_image]
            if task.kind == "flf2v" and request.end_image_path is not None:
                paths.append(request.end_image_path)
            conditions["clip"] = encode_features(encoders, paths)
        image = _encode_images(vae, task, prepared, request.first_image)
        conditions["condition_latents"] = image.cpu()
    # the image itself is the clean first frame
    if task.takes_clean_first_frame and request.image_path is not None:
        pixels = image_pixels(request.image_path, prepared.width, prepared.height, shrink="lanczos")
        conditions[FIRST_LATENTS] = vae.encode(pixels).cpu()
    if task.has_control and request.control_path is not None:
        # The condition channels of a control video and of the encoded images, on the CPU
        has_end = appends_end(task, prepared.request)
        pixels = video_pixels(
            request.control_path,
            "--control_path",
            width=prepared.width,
            height=prepared.height,
            frames=prepared.frames,
            end_frames=FRAMES_PER_LATENT if has_end else 0,  # an end image is one more latent frame
        )
        conditions["condition_latents"] = control_channels(task, vae.encode(pixels), image, has_end).cpu()
    return conditions


def encode_features(encoders: MediaEncoders, paths: Sequence[Path]) -> Tensor:
    """Return the CLIP features of images, 1 T D, on the CPU."""
    features = [encoders.image_encoder.encode(read_pixels(path)[:, :, 0]) for path in paths]
    return torch.cat(features, dim=1).cpu()


def _encode_images(vae: WanVae, task: WanTask, prepared: Prepared, first: Path) -> Tensor:
    """Return the condition channels of the first image, and of the end image if there is one."""

    def pixels(path: Path) -> Tensor:
        return image_pixels(path, prepared.width, prepared.height, keep_aspect=False)

    end_image = prepared.request.end_image_path
    if end_image is not None and not appends_end(task, prepared.request):
        return first_last_condition(vae, pixels(first), pixels(end_image), prepared.frames)
    return image_condition(vae, pixels(first), prepared.frames, pixels(end_image) if end_image else None)


def control_channels(task: WanTask, control: Tensor, image: Tensor | None, has_end: bool = False) -> Tensor:
    """Return the condition channels of a Fun-Control model, B 32 L h w; for Wan2.2 B 36 L h w.

    Source: VideoX-Fun; for Wan2.2 its pipeline_wan2_2_fun_control.py.

    Args:
        task: The task.
        control: Latents of the control video.
        image: Result of `image_condition`; None for zeros in its place, also in the mask.
        has_end: Whether the last frame of `image` is an end image.
    """
    if task.version == "2.2":
        if image is None:
            channels = FRAMES_PER_LATENT + control.shape[1]
            image = control.new_zeros(control.shape[0], channels, *control.shape[2:])
        return torch.cat([control, image.to(control)], dim=1)
    # Wan2.1 sees the first latent frame of the image, and the last one if an end image was appended
    start_latents = torch.zeros_like(control)
    if image is not None:
        latents = image[:, -LATENT.channels :]  # without the mask, whose channels come first
        start_latents[:, :, 0] = latents[:, :, 0].to(start_latents)
        if has_end:
            start_latents[:, :, -1] = latents[:, :, -1].to(start_latents)
    return torch.cat([control, start_latents], dim=1)


def prepare_request(
    task: WanTask,
    request: Request,
    defaults: SamplingDefaults,
    latent: LatentSpec,
    experts: Sequence[Expert],
) -> Prepared:
    """Resolve a request for a task: fill in unset fields, and compute and check the size.

    The video gets the aspect ratio of the image that it starts from.

    Args:
        task: The task.
        request: Request with only the media that the task takes.
        defaults: Defaults of the task.
        latent: Latent space of the model.
        experts: The transformers.

    Raises:
        OptionError: If the model cannot generate the size.
    """
    width, height, frames = get_size(request, defaults)
    if task.frames == 1 and frames != 1:
        raise OptionError(
            f"--video_length {frames}: --task {task.name} generates one image. Omit it, or use t2v."
        )
    flow_shift = default_flow_shift(task, width, height) if request.flow_shift is None else request.flow_shift
    # the released code rounds the size in different ways for image-to-video and for TI2V-5B
    clean_first_frame = request.image_path if task.takes_clean_first_frame else None
    if task.requires_image and request.first_image is not None:
        width, height = size_like_image(image_size(request.first_image), width * height)
    elif clean_first_frame is not None:
        width, height = nearest_size(image_size(clean_first_frame), width * height, latent.pixel_step)
    size = width, height, full_frames(frames, latent)
    if clean_first_frame is not None and size[2] == 1:
        raise OptionError(
            f"--image_path {clean_first_frame}: it becomes the first frame, and the video has only one. "
            "Pass a --video_length of 5 or more, or omit the image"
        )
    check_size((width, height, frames), latent)
    default_negative = FIRST_LAST_NEGATIVE_PROMPT if task.kind == "flf2v" else NEGATIVE_PROMPT
    # the release replaces an empty negative prompt by its default
    request = replace(request, negative_prompt=request.negative_prompt or None)
    return resolve_request(
        request,
        defaults,
        size=size,
        flow_shift=flow_shift,
        default_negative=default_negative,
        experts=experts,
    )
