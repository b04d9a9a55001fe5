"""Cached latents, and the image condition that the transformer takes besides noisy latents.

The image-to-video transformer of SkyReels V1 takes 16 more channels: the latents of the first frame, encoded
alone, in latent frame 0, and zeros in the other frames. Source: the released SkyReels V1 code.
"""

import logging
from functools import lru_cache

import torch
from torch import Tensor

from encoders.tiles import posterior_generator, sample_posterior
from hunyuan_model.vae import LOG_VARIANCE, HunyuanVae
from modules.contract.data import Batch, CacheEntry, LatentSpec, MediaBatch, MomentsBatch
from modules.media.pixels import byte_clips

logger = logging.getLogger(__name__)


def encode_latents(vae: HunyuanVae, media: MediaBatch, with_image: bool) -> list[CacheEntry]:
    """Encode clips in one batch; return the cache entry of each, a posterior sample seeded by its name.

    with_image: also encode the first frame alone, for image-to-video training. Latents are not in model
    space and have the VAE's dtype.
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


def sample_moments(media: MomentsBatch, dtype: torch.dtype) -> list[CacheEntry]:
    """Return the same as `encode_latents` for clips with these moments: the same draws for the same names.

    dtype: of the VAE. With moments of first frames, also `latents_image`.
    """
    generators = [posterior_generator(key) for key in media.keys]
    tensors = {"latents": sample_posterior(_copied(media.moments), generators, LOG_VARIANCE)}
    if media.image is not None:
        tensors["latents_image"] = sample_posterior(_copied(media.image), generators, LOG_VARIANCE)
    return [
        CacheEntry({name: tensor[item].to(dtype) for name, tensor in tensors.items()})
        for item in range(len(media.keys))
    ]


def _copied(moments: Tensor) -> Tensor:
    return moments.to(torch.float32, copy=True)


def first_frame_condition(first: Tensor, frames: int) -> Tensor:
    """Build the further channels, B C F h w float32.

    first: B C 1 h w, in model space. frames: F, latent frames of the video.
    """
    condition = first.new_zeros((*first.shape[:2], frames, *first.shape[3:]), dtype=torch.float32)
    condition[:, :, :1] = first
    return condition


def first_frame_of(batch: Batch, latents: Tensor, spec: LatentSpec) -> Tensor:
    """Return the first frames of a training batch, B C 1 h w in model space.

    They come from caches of the frame alone; if these are missing, from `latents`, which is logged once.
    """
    if "latents_image" in batch.tensors:
        return spec.to_model(batch.tensor("latents_image"))
    _note_missing_image()
    return latents[:, :, :1]


@lru_cache(maxsize=1)  # once, not with every batch
def _note_missing_image() -> None:
    logger.warning(
        "caches without latents_image: the first frame of latents is used, which was encoded together with "
        "later frames. cache_latents.py --i2v caches it alone, as generation encodes it."
    )
