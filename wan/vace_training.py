"""Training inputs of VACE: control, mask and references of a dataset's items, as caches and as conditions.

In caches: `latents_control` of 32 channels (unchanged area, changed area), `vace_mask` as bytes if given, and
`latents_reference_0`, ... of one frame each. In training the references are also frames in front of the
clip's latents, noised and learned with them, as in sampling. Source: DiffSynth-Studio's training of VACE.
"""

import torch
from torch import Tensor

from modules.errors import CacheError
from modules.media.pixels import to_pixels
from protocols.data import CONTROL_MASK, REFERENCE_LATENTS, Batch, CacheEntry, MediaBatch, split_items
from wan.spec import LATENT
from wan.vace import encode_inactive_and_reactive, fold_mask, stack_control
from wan.vae import WanVae


def encode_items(vae: WanVae, media: MediaBatch, store: torch.dtype) -> list[CacheEntry]:
    """Encode items of one size for VACE. `store` is the dtype of the latents.

    A missing control video is replaced by gray; without a mask, all pixels are generated.
    """
    device = vae.device
    pixels = to_pixels(media.frames.to(device))
    control = torch.zeros_like(pixels)
    if media.control:
        control = to_pixels(media.control[0].to(device))
    mask = media.control_mask
    if mask is None:
        mask = torch.full_like(media.frames[..., 0], 255)  # white: everything is generated
    levels = mask.to(device)[:, None].float()  # 0..255
    tensors = {"latents": vae.encode(pixels).to(store)}
    # VACE encodes the kept part of the control and the part to generate separately
    vace_latents = encode_inactive_and_reactive(vae, control, levels / 255)
    tensors["latents_control"] = vace_latents.to(store)
    if media.control_mask is not None:
        tensors[CONTROL_MASK] = fold_mask(levels).to(torch.uint8)
    for index, reference in enumerate(media.references):
        latents = vae.encode(to_pixels(reference.to(device)))
        tensors[f"{REFERENCE_LATENTS}_{index}"] = latents.to(store)
    return split_items(tensors)


def batch_control(batch: Batch) -> dict[str, Tensor | list[Tensor]]:
    """Return `vace_control`, B 96 K+L h w. Raises CacheError if the control was cached for another model."""
    vace_latents = batch.tensor("latents_control").float()
    if vace_latents.shape[1] != 2 * LATENT.channels:
        raise CacheError(
            f"{batch.keys[0]}: its control has {vace_latents.shape[1]} channels in the cache, but VACE takes "
            f"{2 * LATENT.channels}. Cache again with wan_cache_latents.py --vace."
        )
    if CONTROL_MASK in batch.tensors:
        mask = batch.tensor(CONTROL_MASK).to(vace_latents) / 255
    else:
        # white: everything is generated; one channel for each pixel of a latent pixel
        mask = vace_latents.new_ones(
            len(vace_latents), LATENT.stride[1] * LATENT.stride[2], *vace_latents.shape[2:]
        )
    names = [name for name in batch.tensors if name.startswith(REFERENCE_LATENTS)]
    names.sort(key=lambda name: int(name.rpartition("_")[2]))  # by the index at the end
    references = [batch.tensor(name) for name in names]
    return {"vace_control": stack_control(vace_latents, mask, references)}
