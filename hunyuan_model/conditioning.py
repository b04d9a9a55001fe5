"""Latents as caches hold them, and what the transformer is given beside noisy latents.

The image-to-video transformer of SkyReels V1 takes 16 more channels: the latents of the first frame, encoded
alone, in latent frame 0, and zeros after it. Source: the released SkyReels V1 code.
"""

import logging
from functools import lru_cache

import torch
from torch import Tensor

from hunyuan_model.vae import HunyuanVae
from modules.contract.data import Batch, CacheEntry, MediaBatch
from modules.contract.family import LatentSpec
from modules.media.pixels import byte_clips
from modules.seeds import derive_seed

logger = logging.getLogger(__name__)


def cached_latents(vae: HunyuanVae, media: MediaBatch, with_image: bool) -> list[CacheEntry]:
    """What the caches of clips hold, all encoded in one batch, each from the posterior sample of its own
    name.

    with_image: also the first frame alone, for image-to-video training. Not in model space; in the VAE's
    dtype.
    """
    generators = [posterior_generator(key) for key in media.keys]
    pixels = byte_clips(media.frames)
    tensors = {"latents": vae.encode(pixels, generators)}
    if with_image:
        tensors["latents_image"] = vae.encode(pixels[:, :, :1], generators)
    return [
        CacheEntry({name: tensor[item].to(vae.dtype) for name, tensor in tensors.items()})
        for item in range(len(pixels))
    ]


def first_frame_condition(first: Tensor, frames: int) -> Tensor:
    """The further channels, B C F h w float32.

    first: B C 1 h w, in model space. frames: F, latent frames of the video.
    """
    condition = first.new_zeros((*first.shape[:2], frames, *first.shape[3:]), dtype=torch.float32)
    condition[:, :, :1] = first
    return condition


def first_frame_of(batch: Batch, latents: Tensor, spec: LatentSpec) -> Tensor:
    """The first frames of a training batch, B C 1 h w in model space: as cached alone, else out of `latents`,
    with one notice.
    """
    if "latents_image" in batch.tensors:
        return spec.to_model(batch.tensor("latents_image"))
    _note_missing_image()
    return latents[:, :, :1]


@lru_cache(maxsize=1)  # once, not with every batch
def _note_missing_image() -> None:
    logger.warning(
        "caches without latents_image: the first frame of latents stands for it, which was encoded together "
        "with later frames. "
        "cache_latents.py --i2v caches it alone, as generation encodes it."
    )


def posterior_generator(owner: int | str) -> torch.Generator:
    """What the sample of an encoded clip is drawn from. owner: the name of the cached item, or the seed of
    the video to make.

    So an item's cache does not depend on what else a run had to do, nor a video on anything but its seed.
    """
    return torch.Generator().manual_seed(derive_seed("posterior", owner))
