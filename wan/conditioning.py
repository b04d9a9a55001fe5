"""Turn images and videos into the conditions of a Wan transformer.

Image-to-video models take 20 more channels: 4 of a mask (1 if the latent frame is known) and 16 of the
latents of the known frames, with mid-grey for the others. Fun-Control models of Wan2.1 take 32: 16 of the
control video's latents and 16 of the start image's, without a mask; those of Wan2.2 take 36, the image's with
its mask. Source: the released Wan2.1 code (Wan team 2025,
arXiv 2503.20314, section 5) and VideoX-Fun for Fun-Control.
"""

import torch
from einops import rearrange
from torch import Tensor

from wan.vae import WanVae

FRAMES_PER_LATENT = 4  # so the mask has 4 channels
SIZE_STEP = 16  # pixels: VAE stride 8, patch 2


def size_like_image(image: tuple[int, int], area: int) -> tuple[int, int]:
    """Return width and height with the image's aspect and about `area` pixels, floored to multiples of 16.

    image: width, height. Source: the released image-to-video code, which floors latent sides to multiples of
    the patch.
    """
    aspect = image[1] / image[0]
    sides = ((area / aspect) ** 0.5, (area * aspect) ** 0.5)
    # add a little because the root of an exact square may come out just below it
    width, height = (max(int((side + 1e-6) // SIZE_STEP) * SIZE_STEP, SIZE_STEP) for side in sides)
    return width, height


def nearest_size(image: tuple[int, int], area: int, step: int) -> tuple[int, int]:
    """Return width and height, multiples of `step` with at most `area` pixels, near to the image's aspect.

    image: width, height. Either side may be rounded down first, and the other one is then as long as the area
    allows; of the two sizes the one whose aspect is nearer to the image's. Source: the released code of
    TI2V-5B.
    """
    aspect = image[0] / image[1]
    # add a little because the root of an exact square may come out just below it
    width, height = (
        int((area * ratio) ** 0.5 + 1e-6) // step * step or step for ratio in (aspect, 1 / aspect)
    )
    sizes = [
        (width, area // width // step * step or step),
        (area // height // step * step or step, height),
    ]

    def stretch(size: tuple[int, int]) -> float:
        ratio = size[0] / size[1] / aspect
        return max(ratio, 1 / ratio)

    # a side of one step may be too long for the area; of equal ones that with the rounded height, as released
    fitting = [size for size in sizes if size[0] * size[1] <= area] or sizes
    return min(reversed(fitting), key=stretch)


def frame_mask(known: Tensor) -> Tensor:
    """Turn the known pixel frames (F, 0 or 1) into a mask 4 L.

    The first frame is repeated four times; then each group of four frames becomes the channels of a latent
    frame.
    """
    repeated = torch.cat([known[:1].repeat(FRAMES_PER_LATENT), known[1:]])
    return rearrange(repeated, "(l c) -> c l", c=FRAMES_PER_LATENT)


def image_condition(vae: WanVae, image: Tensor, frames: int, end_image: Tensor | None = None) -> Tensor:
    """Return the condition of image-to-video: B 20 L h w, float32.

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
    """Return the condition of first-and-last-frame models: B 20 L h w, float32.

    first, last: B 3 1 H W; both are encoded in one clip.
    """
    if frames == 1:
        return image_condition(vae, first, 1)
    middle = first.new_zeros(*first.shape[:2], frames - 2, *first.shape[3:])
    known = torch.zeros(frames)
    known[0] = known[-1] = 1
    return _with_mask(frame_mask(known), vae.encode(torch.cat([first, middle, last], dim=2)))


def control_condition(control: Tensor, image: Tensor | None, has_end: bool = False) -> Tensor:
    """Return the condition of Fun-Control: B 32 L h w.

    control: latents of the control video. image: latents of the start image, B 16 L h w, or None. Only the
    first latent frame of `image` is used, and the last one if an end image was appended (`has_end`).
    """
    start = torch.zeros_like(control)
    if image is not None:
        start[:, :, 0] = image[:, :, 0].to(start)
        if has_end:
            start[:, :, -1] = image[:, :, -1].to(start)
    return torch.cat([control, start], dim=1)


def masked_control_condition(control: Tensor, image: Tensor | None) -> Tensor:
    """Return the condition of Wan2.2's Fun-Control: B 36 L h w; the last 20 channels are those of an image.

    control: latents of the control video. image: as `image_condition` makes it; zeros,
    also for the mask, if there is none. Source: VideoX-Fun, pipeline_wan2_2_fun_control.py.
    """
    if image is None:
        image = control.new_zeros(control.shape[0], FRAMES_PER_LATENT + control.shape[1], *control.shape[2:])
    return torch.cat([control, image.to(control)], dim=1)


def _with_mask(mask: Tensor, latents: Tensor) -> Tensor:
    batch, _, _, height, width = latents.shape
    spread = mask.to(latents)[None, :, :, None, None].expand(batch, -1, -1, height, width)
    return torch.cat([spread, latents], dim=1)
