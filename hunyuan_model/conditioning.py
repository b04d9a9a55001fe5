"""What caches and a HunyuanVideo or SkyReels V1 transformer are given beside noisy latents and text.

The image-to-video transformer of SkyReels V1 takes 16 more channels: the latents of the first frame, encoded alone, in latent
frame 0, and zeros after it. Source: the released SkyReels V1 code.
"""

import torch
from torch import Tensor

from hunyuan_model.vae import HunyuanVae
from modules.pixels import to_pixels
from modules.records import CacheEntry, MediaBatch
from modules.seeds import derive_seed


def cached_latents(vae: HunyuanVae, media: MediaBatch, with_image: bool) -> list[CacheEntry]:
    """What the caches of clips hold, all encoded in one batch, each from the posterior sample of its own name.

    with_image: also the first frame alone, for image-to-video training. Not in model space; in the VAE's dtype.
    """
    generators = [posterior_generator(key) for key in media.keys]
    pixels = to_pixels(media.frames.to(vae.device))  # as bytes it is a quarter to copy
    tensors = {"latents": vae.encode(pixels, generators)}
    if with_image:
        tensors["latents_image"] = vae.encode(pixels[:, :, :1], generators)
    return [CacheEntry({name: tensor[item].to(vae.dtype) for name, tensor in tensors.items()}) for item in range(len(pixels))]


def first_frame_condition(first: Tensor, frames: int) -> Tensor:
    """The further channels, B C F h w float32. first: B C 1 h w, in model space. frames: F, latent frames of the video."""
    condition = first.new_zeros((*first.shape[:2], frames, *first.shape[3:]), dtype=torch.float32)
    condition[:, :, :1] = first
    return condition


def posterior_generator(owner: int | str) -> torch.Generator:
    """What the sample of an encoded clip is drawn from. owner: the name of the cached item, or the seed of the video to make.

    So an item's cache does not depend on what else a run had to do, nor a video on anything but its seed.
    """
    return torch.Generator().manual_seed(derive_seed("posterior", owner))
