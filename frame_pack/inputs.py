"""Encode the images of a request as inputs of its sections: latents, and features of the image encoder.

Every latent is a sample of the VAE's posterior, seeded by the request alone: that of a file does not depend
on the other files. Source: the released code; masks as in kisekaeichi.
"""

from pathlib import Path

import numpy
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from frame_pack.masks import latent_mask
from frame_pack.requests import controls_of, images_of, masks_of
from hunyuan_model.conditioning import posterior_generator
from hunyuan_model.family import LATENT as VAE_LATENT
from modules.contract.data import Conditions, MediaEncoders
from modules.contract.generation import Request
from modules.media.buckets import Size
from modules.media.pixels import image_pixels


def video_inputs(encoders: MediaEncoders, request: Request, sections: int) -> dict[int, Conditions]:
    """Encode the image of each section: `image_embeddings` (1 S D) and `start_latents` (1 16 1 h w).

    Section 0 may also have `end_latents`. All on the CPU, latents in model space; sections with the same
    image share its tensors.
    """
    images = images_of(request, sections)
    embeddings = {path: _embeddings(encoders, path, request) for path in dict.fromkeys(images)}
    end = [] if request.end_image_path is None else [request.end_image_path]
    latents = {path: _latents(encoders, path, request) for path in dict.fromkeys([*images, *end])}
    inputs: dict[int, Conditions] = {
        index: {"image_embeddings": embeddings[path], "start_latents": latents[path]}
        for index, path in enumerate(images)
    }
    if end:
        inputs[0] = {**inputs[0], "end_latents": latents[end[0]]}
    return inputs


def one_frame_inputs(encoders: MediaEncoders, request: Request) -> dict[int, Conditions]:
    """Encode the start image as `image_embeddings` (1 S D), control images as `control_latents` (1 16 n h w).

    A control's latent is multiplied by its mask: the mask file, else the control's alpha channel. On the CPU.
    """
    (image,) = images_of(request, 1)
    conditions: dict[str, Tensor | list[Tensor]] = {"image_embeddings": _embeddings(encoders, image, request)}
    controls, masks = controls_of(request), masks_of(request)
    if controls:
        latents = {path: _latents(encoders, path, request) for path in dict.fromkeys(controls)}
        masked = []
        for index, path in enumerate(controls):
            latent = latents[path]
            size = (latent.shape[-1], latent.shape[-2])
            mask = read_mask(masks[index], size) if index < len(masks) else read_alpha(path, size)
            masked.append(latent if mask is None else latent * mask)
        conditions["control_latents"] = torch.cat(masked, dim=2)
    return {0: conditions}


def read_mask(path: Path, size: Size) -> Tensor:
    """Read an image as grey values, h w in 0..1. size: width and height of the latents. Raises MediaError."""
    from modules.media.reading import read_image

    grey = numpy.array(Image.fromarray(read_image(path)).convert("L"))
    return latent_mask(torch.from_numpy(grey), size[1], size[0])


def read_alpha(path: Path, size: Size) -> Tensor | None:
    """Read the alpha channel of an image, h w in 0..1; None if it has none. Raises MediaError."""
    from modules.media.reading import read_image

    image = torch.from_numpy(read_image(path, alpha=True))
    return latent_mask(image[..., 3].contiguous(), size[1], size[0]) if image.shape[2] == 4 else None


def _embeddings(encoders: MediaEncoders, path: Path, request: Request) -> Tensor:
    width, height, _ = request.size
    return encoders.image_encoder.encode(
        rearrange(image_pixels(path, width, height), "b c 1 h w -> b c h w")
    ).cpu()


def _latents(encoders: MediaEncoders, path: Path, request: Request) -> Tensor:
    width, height, _ = request.size
    pixels = image_pixels(path, width, height)
    return (encoders.vae.encode(pixels, [posterior_generator(request.seed)]) * VAE_LATENT.scale).cpu()
