"""What the transformer takes besides noisy latents, under the names of caches; latents of pictures."""

from collections.abc import Mapping

import torch
from torch import Tensor

from encoders.autoencoder import Autoencoder
from encoders.posterior import posterior_generator
from modules.contract.data import CacheEntry, Conditions, MediaBatch
from modules.devices import send
from modules.media.pixels import byte_clips

POOLED, STATES, MASK, GUIDANCE = "l_pooled", "t5_out", "t5_attn_mask", "guidance"
CHROMA_KEYS = frozenset({STATES, MASK})
FLUX_KEYS = CHROMA_KEYS | {POOLED}


def text_keys(has_pooled: bool) -> frozenset[str]:
    """Return the names of what the text encoders give."""
    return FLUX_KEYS if has_pooled else CHROMA_KEYS


def text_inputs(
    cond: Conditions, device: torch.device, has_pooled: bool, uses_mask: bool
) -> Mapping[str, Tensor]:
    """Return the conditions that a text gives, under the names of the network's arguments, on its device.

    uses_mask: padding behind the text is left out; else it counts as text.
    """
    names = {"t5": STATES}
    if has_pooled:
        names["pooled"] = POOLED
    if uses_mask:
        names["t5_mask"] = MASK
    found = {}
    for argument, name in names.items():
        value = cond[name]
        assert isinstance(value, Tensor)
        found[argument] = send(value, device)
    return found


def encode_latents(vae: Autoencoder, media: MediaBatch) -> list[list[CacheEntry]]:
    """Encode pictures; return the cache entries of each: a posterior sample seeded by its name, float32."""
    latents = vae.encode(byte_clips(media.frames), [posterior_generator(key) for key in media.keys])
    return [[CacheEntry({"latents": one.clone()})] for one in latents.cpu()]
