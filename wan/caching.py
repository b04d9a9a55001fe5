"""Encode the items of a dataset for the cache files of Wan."""

import torch

from modules.contract.data import (
    CacheEntry,
    MediaBatch,
    MediaEncoders,
    MediaTable,
    MomentsBatch,
    MomentsRules,
)
from modules.errors import DatasetError
from modules.media.pixels import to_pixels
from wan import conditioning
from wan.configs import WanTask
from wan.vae import normalise


def check_controls(task: WanTask, table: MediaTable) -> None:
    """Raise DatasetError if an item has more than one control image, or one that the model cannot take."""
    if table.has_control and len(table.clean_indices) > 1:
        raise DatasetError(
            f"{table.name}: Wan takes one control video or image for each item, fp_1f_clean_indices asks "
            f"for {len(table.clean_indices)}. Remove fp_1f_clean_indices."
        )
    if table.has_control and task.kind == "ti2v":
        raise DatasetError(
            f"{table.name}: Wan2.2 TI2V-5B takes no control videos. Remove the table's control_directory "
            "or control_path, or cache with the VAE of another model."
        )


def encode_together(
    encoders: MediaEncoders, media: MediaBatch, store: torch.dtype, image_kind: str | None
) -> list[CacheEntry]:
    """Encode all items in one batch: latents, those of control videos, and with `image_kind` the image's.

    store: dtype of the latents. image_kind: i2v, flf2v, or None for text-to-video caches. Without an image
    encoder there are no image features: Wan2.2 takes none.
    """
    vae = encoders.vae
    pixels = to_pixels(media.frames.to(vae.device))  # as bytes it is a quarter to copy
    tensors = {"latents": vae.encode(pixels).to(store)}
    if media.control:
        tensors["latents_control"] = vae.encode(to_pixels(media.control[0].to(vae.device))).to(store)
    if image_kind is not None:
        first, last, frames = pixels[:, :, :1], pixels[:, :, -1:], pixels.shape[2]
        if image_kind == "flf2v":
            condition, images = conditioning.first_last_condition(vae, first, last, frames), [first, last]
        else:
            condition, images = conditioning.image_condition(vae, first, frames), [first]
        tensors["latents_image"] = condition.to(store)
        if encoders.image_encoder is not None:
            features = [encoders.image_encoder.encode(image[:, :, 0]) for image in images]
            tensors["clip"] = torch.cat(features, dim=1).to(torch.float16)
    return [
        CacheEntry({name: tensor[item] for name, tensor in tensors.items()}) for item in range(len(pixels))
    ]


def moments_rules(image_kind: str | None) -> MomentsRules:
    """Return what caches can be made from without frames. image_kind: as of `encode_together`."""
    if image_kind is None:
        return MomentsRules()
    return MomentsRules(
        "Wan's image-to-video caches hold the first frame followed by grey frames, encoded together, and "
        "features of the image, for which the frames are needed. Leave out load_tensors, or --i2v, --clip "
        "and --flf2v"
    )


def normalise_moments(media: MomentsBatch, store: torch.dtype) -> list[CacheEntry]:
    """Return the latents of clips with these moments. store: their dtype."""
    latents = normalise(media.moments.float().chunk(2, dim=1)[0]).to(store)
    return [CacheEntry({"latents": latent}) for latent in latents]
