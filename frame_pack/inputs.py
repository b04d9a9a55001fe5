"""Encode the images of a request as inputs of its sections: latents, and features of the image encoder.

Every latent is a sample of the VAE's posterior, seeded by the request alone, so that the result for a file
does not depend on the other files. Source: the released code; masks as in kisekaeichi.
"""

import itertools
from pathlib import Path

import numpy
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from encoders.tiles import posterior_generator
from frame_pack.requests import FramePackRequest
from frame_pack.sections import LATENT_STRIDE
from hunyuan_model.spec import LATENT as VAE_LATENT
from hunyuan_model.vae import HunyuanVae
from modules.media.buckets import Size
from modules.media.pixels import byte_clips, image_pixels
from protocols.data import Conditions, MediaEncoders
from protocols.requests import Prepared


def video_inputs(encoders: MediaEncoders, prepared: Prepared) -> dict[int, Conditions]:
    """Encode the image of each section as `image_embeddings` (1 S D) and `start_latents` (1 16 1 h w).

    Section 0 may also have `end_latents`. All tensors are on the CPU, latents in model space; sections with
    the same image share its tensors.
    """
    settings: FramePackRequest = prepared.family_settings
    images, end_image = settings.images, prepared.request.end_image_path
    # each distinct image is encoded once
    embeddings = {path: _encode_embeddings(encoders, path, prepared) for path in dict.fromkeys(images)}
    end = [] if end_image is None else [end_image]
    latents = {path: _encode_latents(encoders, path, prepared) for path in dict.fromkeys([*images, *end])}
    inputs: dict[int, Conditions] = {
        index: {"image_embeddings": embeddings[path], "start_latents": latents[path]}
        for index, path in enumerate(images)
    }
    if end:
        inputs[0] = {**inputs[0], "end_latents": latents[end[0]]}
    return inputs


def encode_clip(vae: HunyuanVae, frames: Tensor, seed: int, window: int) -> Tensor:
    """Encode a clip of any length, 1 F H W 3 uint8 with F = 4n + 1, to 1 16 n+1 h w in model space.

    Two sections are encoded at a time, the first only as context for the second, so that memory does not grow
    with the length.
    """
    section = LATENT_STRIDE * window
    generators = [posterior_generator(seed)]
    parts: list[Tensor] = []
    for start in range(0, max(frames.shape[1] - 1 - section, 1), section):
        piece = byte_clips(frames[:, start : start + 2 * section + 1])
        latents = (vae.encode(piece, generators) * VAE_LATENT.scale).cpu()
        parts.append(latents[:, :, window + 1 :] if parts else latents)
    return torch.cat(parts, dim=2)


def one_frame_inputs(encoders: MediaEncoders, prepared: Prepared) -> dict[int, Conditions]:
    """Encode the start image to `image_embeddings`, 1 S D, and controls to `control_latents`, 1 16 n h w.

    A control's latent is multiplied by its mask: the mask file, or else the control's alpha channel. All
    tensors are on the CPU.
    """
    settings: FramePackRequest = prepared.family_settings
    (image,) = settings.images
    conditions: dict[str, Tensor | list[Tensor]] = {
        "image_embeddings": _encode_embeddings(encoders, image, prepared, on_white=False)
    }
    if not settings.controls:
        return {0: conditions}
    latents = {}
    for path in dict.fromkeys(settings.controls):  # each file once, even if it is given twice
        latents[path] = _encode_latents(encoders, path, prepared, on_white=False)
    masked = []
    # masks belong to the first controls; the alpha channel replaces a missing one
    for path, mask_path in itertools.zip_longest(settings.controls, settings.masks[: len(settings.controls)]):
        *_, height, width = latents[path].shape
        size = (width, height)
        mask = read_alpha(path, size) if mask_path is None else read_mask(mask_path, size)
        masked.append(latents[path] if mask is None else latents[path] * mask)
    conditions["control_latents"] = torch.cat(masked, dim=2)
    return {0: conditions}


def read_mask(path: Path, size: Size) -> Tensor:
    """Read an image as a mask, h w in 0..1.

    `size` is the latents' width and height. Raises MediaError if the image cannot be read.
    """
    from modules.media.reading import read_mask

    gray = numpy.array(Image.fromarray(read_mask(path)).convert("L"))
    return latent_mask(torch.from_numpy(gray), size[1], size[0])


def read_alpha(path: Path, size: Size) -> Tensor | None:
    """Read the alpha channel of an image, h w in 0..1; None if it has none.

    Raises MediaError if the image cannot be read.
    """
    from modules.media.reading import read_image

    image = torch.from_numpy(read_image(path, alpha=True))
    return latent_mask(image[..., 3].contiguous(), size[1], size[0]) if image.shape[2] == 4 else None


# one frame: transparency counts as a mask, as in training, so its colors stay
def _encode_embeddings(
    encoders: MediaEncoders, path: Path, prepared: Prepared, on_white: bool = True
) -> Tensor:
    pixels = image_pixels(path, prepared.width, prepared.height, on_white=on_white)
    return encoders.image_encoder.encode(rearrange(pixels, "b c 1 h w -> b c h w")).cpu()


def _encode_latents(encoders: MediaEncoders, path: Path, prepared: Prepared, on_white: bool = True) -> Tensor:
    pixels = image_pixels(path, prepared.width, prepared.height, on_white=on_white)
    return (encoders.vae.encode(pixels, [posterior_generator(prepared.seed)]) * VAE_LATENT.scale).cpu()


def latent_mask(alpha: Tensor, height: int, width: int) -> Tensor:
    """Resize an alpha channel to the latents' size, height x width float32: 0 transparent, 1 opaque.

    The filter is Lanczos, as in kisekaeichi's implementation in musubi-tuner.

    Args:
        alpha: H W uint8, cropped to the part of an image that covers the latents.
        height: Height of the latents.
        width: Width of the latents.
    """
    # the box is the largest centered part with the aspect ratio of the latents
    scale = min(alpha.shape[1] / width, alpha.shape[0] / height)
    left, top = (alpha.shape[1] - scale * width) / 2, (alpha.shape[0] - scale * height) / 2
    box = (left, top, alpha.shape[1] - left, alpha.shape[0] - top)
    small = Image.fromarray(alpha.cpu().numpy()).resize((width, height), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(numpy.asarray(small).copy()).float() / 255


def apply_masks(latents: Tensor, alpha: Tensor | None) -> Tensor:
    """Multiply latents, B C F h w, by masks made from `alpha`, B H W uint8; None leaves them unchanged."""
    if alpha is None:
        return latents
    masks = torch.stack([latent_mask(image, *latents.shape[-2:]) for image in alpha])
    return (latents * masks[:, None, None].to(latents.device)).to(latents.dtype)
