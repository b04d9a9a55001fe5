"""From images and videos to what a Wan2.1 transformer is conditioned on.

Image-to-video models take 20 more channels: 4 of a mask (1 where the latent frame is known) and 16 of the latents of the known
frames, the rest mid-grey. Fun-Control models take 32: 16 of the control video's latents and 16 of the start image's, no mask.
Source: the released Wan2.1 code (Wan team 2025, arXiv 2503.20314, section 5) and VideoX-Fun for Fun-Control.
"""

from itertools import islice
from pathlib import Path

import cv2
import numpy
import torch
from einops import rearrange
from torch import Tensor

from modules.errors import MediaError
from modules.media import read_image, resize_cover, video_frames
from wan.vae import WanVae

FRAMES_PER_LATENT = 4  # and so the mask has 4 channels
SIZE_STEP = 16  # pixels: VAE stride 8, patch 2


def size_like_image(image: tuple[int, int], area: int) -> tuple[int, int]:
    """Width and height of the image's aspect whose area comes near `area`, floored to multiples of 16. image: width, height.

    Source: the released image-to-video code: latent sides are floored to multiples of the patch.
    """
    aspect = image[1] / image[0]
    sides = ((area / aspect) ** 0.5, (area * aspect) ** 0.5)
    # a hair is added because the root of an exact square may come out below it
    width, height = (max(int((side + 1e-6) // SIZE_STEP) * SIZE_STEP, SIZE_STEP) for side in sides)
    return width, height


def to_pixels(frames: Tensor) -> Tensor:
    """B F H W C uint8 (alpha is dropped) -> B 3 F H W float32 in -1..1."""
    return rearrange(frames[..., :3], "b f h w c -> b c f h w").float() / 127.5 - 1


def read_pixels(path: Path) -> Tensor:
    """An image file at its own size as 1 3 1 H W float32 in -1..1."""
    return to_pixels(torch.from_numpy(read_image(path)[None, None]))


def image_pixels(path: Path, width: int, height: int, keep_aspect: bool) -> Tensor:
    """An image file at exactly width x height as 1 3 1 H W float32 in -1..1.

    keep_aspect: scale to cover and crop the middle, as training sees images; else stretch, as the released generation code does
    after it has chosen a size of the image's own aspect.
    """
    image = read_image(path)
    if keep_aspect:
        image = resize_cover(image, (width, height))
    elif image.shape[:2] != (height, width):
        method = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_CUBIC
        image = numpy.asarray(cv2.resize(image, (width, height), interpolation=method))
    return to_pixels(torch.from_numpy(image[None, None]))


def read_control(path: Path, width: int, height: int, frames: int, end_frames: int = 0) -> Tensor:
    """A control video or folder of images, its frames scaled to cover, as 1 3 F+E H W float32 in -1..1.

    Its first `frames` are taken. An end image takes `end_frames` (E) more, of which the video has to have one: the last one it has
    stands for those it lacks. Raises MediaError where it is too short.
    """
    needed = frames + min(end_frames, 1)
    found = [resize_cover(frame, (width, height)) for frame in islice(video_frames(path), frames + end_frames)]
    if len(found) < needed:
        raise MediaError(
            f"--control_path {path}: it has {len(found)} frames, {needed} are needed. Lower the length or give a longer one."
        )
    found += [found[-1]] * (frames + end_frames - len(found))
    return to_pixels(torch.from_numpy(numpy.stack(found)[None]))


def frame_mask(known: Tensor) -> Tensor:
    """Which pixel frames are known (F, 0 or 1) -> 4 L: the first frame counts four times, then groups of four are channels."""
    repeated = torch.cat([known[:1].repeat(FRAMES_PER_LATENT), known[1:]])
    return rearrange(repeated, "(l c) -> c l", c=FRAMES_PER_LATENT)


def image_condition(vae: WanVae, image: Tensor, frames: int, end_image: Tensor | None = None) -> Tensor:
    """Condition of image-to-video: B 20 L h w, float32.

    image, end_image: B 3 1 H W in -1..1. An end image is encoded alone and appended as one more latent frame.
    """
    clip = torch.cat([image, image.new_zeros(*image.shape[:2], frames - 1, *image.shape[3:])], dim=2)
    latents = vae.encode(clip)
    known = torch.zeros(frames)
    known[0] = 1
    mask = frame_mask(known)
    if end_image is not None:
        latents = torch.cat([latents, vae.encode(end_image)], dim=2)
        mask = torch.cat([mask, torch.ones(FRAMES_PER_LATENT, 1)], dim=1)
    return _with_mask(mask, latents)


def first_last_condition(vae: WanVae, first: Tensor, last: Tensor, frames: int) -> Tensor:
    """Condition of first-and-last-frame models: B 20 L h w, float32; both images (B 3 1 H W) stand in one clip."""
    if frames == 1:
        return image_condition(vae, first, 1)
    middle = first.new_zeros(*first.shape[:2], frames - 2, *first.shape[3:])
    known = torch.zeros(frames)
    known[0] = known[-1] = 1
    return _with_mask(frame_mask(known), vae.encode(torch.cat([first, middle, last], dim=2)))


def control_condition(control: Tensor, image: Tensor | None, has_end: bool = False) -> Tensor:
    """Condition of Fun-Control: B 32 L h w from control latents and the latents of the start image (B 16 L h w), if any.

    Only the first latent frame of the image part is kept, and the last where an end image was appended.
    """
    start = torch.zeros_like(control)
    if image is not None:
        start[:, :, 0] = image[:, :, 0].to(start)
        if has_end:
            start[:, :, -1] = image[:, :, -1].to(start)
    return torch.cat([control, start], dim=1)


def _with_mask(mask: Tensor, latents: Tensor) -> Tensor:
    batch, _, _, height, width = latents.shape
    spread = mask.to(latents)[None, :, :, None, None].expand(batch, -1, -1, height, width)
    return torch.cat([spread, latents], dim=1)
