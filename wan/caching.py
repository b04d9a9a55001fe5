"""Encode the items of a dataset for the cache files of Wan, and turn cached tensors into conditions."""

import torch
from torch import Tensor

from modules.errors import CacheError
from modules.media.pixels import to_pixels
from protocols.data import (
    FRAME_INDICES,
    Batch,
    CacheEntry,
    Conditions,
    MediaBatch,
    MediaEncoders,
    split_items,
)
from wan.configs import BERNINI, VACE, WanConfig, WanTask
from wan.inputs import (
    control_channels,
    first_last_condition,
    image_condition,
)
from wan.options import ONE_FRAME
from wan.spec import LATENT


def encode_together(
    encoders: MediaEncoders, media: MediaBatch, store: torch.dtype, condition_kind: str | None
) -> list[CacheEntry]:
    """Encode all items in one batch: latents, control videos, and the image condition of `condition_kind`.

    Without an image encoder there are no image features; Wan2.2 uses none.

    Args:
        encoders: VAE and image encoder.
        media: Clips or images of one size.
        store: Dtype of the stored latents.
        condition_kind: i2v, flf2v, vace, bernini or one_frame; None for text-to-video caches.
    """
    vae = encoders.vae
    if condition_kind == VACE:
        from wan import vace_training  # only for VACE

        return vace_training.encode_items(vae, media, store)
    if condition_kind == BERNINI:
        from wan import bernini  # only for Bernini

        return bernini.encode_items(vae, media, store)
    if condition_kind == ONE_FRAME:
        from wan import one_frame  # only for single images

        return one_frame.encode_items(encoders, media, store)
    pixels = to_pixels(media.frames.to(vae.device))  # copied as bytes, a quarter of the float32 size
    tensors = {"latents": vae.encode(pixels).to(store)}
    if media.control:
        control = to_pixels(media.control[0].to(vae.device))
        tensors["latents_control"] = vae.encode(control).to(store)
    if condition_kind is not None:
        tensors |= _encode_images(encoders, pixels, store, has_last=condition_kind == "flf2v")
    return split_items(tensors)


def _encode_images(
    encoders: MediaEncoders, pixels: Tensor, store: torch.dtype, has_last: bool
) -> dict[str, Tensor]:
    """Return the image condition and, with an image encoder, the features of the clips' first frames."""
    # With `has_last`, the last frames are part of both.
    first, last = pixels[:, :, :1], pixels[:, :, -1:]
    if has_last:
        images = [first, last]
        condition = first_last_condition(encoders.vae, first, last, pixels.shape[2])
    else:
        images = [first]
        condition = image_condition(encoders.vae, first, pixels.shape[2])
    tensors = {"latents_image": condition.to(store)}
    if encoders.image_encoder is not None:
        features = [encoders.image_encoder.encode(image[:, :, 0]) for image in images]
        tensors["clip"] = torch.cat(features, dim=1).to(torch.float16)
    return tensors


# why caches with image conditions cannot be made from moments
NO_MOMENTS = (
    "Wan's image-to-video caches hold the first frame followed by gray frames, encoded together, and "
    "features of the image, for which the frames are needed. Omit load_tensors, or --i2v, --clip "
    "and --flf2v"
)
NO_BERNINI_MOMENTS = "Bernini's caches hold sources, for which frames are needed. Omit --bernini"
NO_VACE_MOMENTS = "VACE's caches hold the kept and the changed parts of a clip, for which frames are needed"
CLIP_TOKENS = 257  # per image: 16 x 16 patches and the class token


def batch_conditions(
    task: WanTask, config: WanConfig, batch: Batch, zeros_on: torch.device | None
) -> Conditions:
    """Return the text, `condition_latents` B C F H W and, if the task uses them, CLIP features of a batch.

    1. Leave batches of single images (--one_frame) and of VACE to their own modules.
    2. Check that the caches have every tensor that the task needs.
    3. Combine image and control latents into the condition channels.

    Args:
        task: The task that is trained.
        config: Dimensions of the transformer.
        batch: Batch from the caches.
        zeros_on: Device for zero image features, if the model has image attention and the task no image.
            Copying zeros from the host would make the host wait.

    Raises:
        CacheError: With the command that makes it, if a tensor is missing or is for another number of images.
    """
    if FRAME_INDICES in batch.tensors:
        from wan import one_frame  # only for single images

        return one_frame.batch_conditions(task, config, batch)
    needed = {"t5": "a text cache"}  # tensor -> what provides it, for errors
    if task.kind == VACE:
        from wan import vace_training  # only for VACE

        batch.check({**needed, "latents_control": "wan_cache_latents.py --vace"}, f"--task {task.name}")
        return {"t5": batch.tensors["t5"], **vace_training.batch_control(batch)}
    if task.kind == BERNINI:
        from wan import bernini  # only for Bernini

        batch.check(needed, f"--task {task.name}")
        return {"t5": batch.tensors["t5"], **bernini.batch_sources(batch)}
    # what the task takes besides the text
    if task.uses_clip_features:
        needed |= {"clip": "wan_cache_latents.py --clip", "latents_image": "wan_cache_latents.py --clip"}
    elif task.requires_image:
        needed |= {"latents_image": "wan_cache_latents.py --i2v"}
    if task.has_control:
        needed["latents_control"] = "a dataset with control_directory"
    batch.check(needed, f"--task {task.name}")
    conditions: dict[str, Tensor | list[Tensor]] = {"t5": batch.tensors["t5"]}
    if task.uses_clip_features:
        conditions["clip"] = _read_features(task, config, batch)
    elif zeros_on is not None:
        conditions |= no_features(config, len(batch), zeros_on)
    if task.has_control:
        conditions["condition_latents"] = _combine_control(task, batch)
    elif task.requires_image:
        conditions["condition_latents"] = batch.tensor("latents_image").float()
    return conditions


def _combine_control(task: WanTask, batch: Batch) -> Tensor:
    """Return the condition channels of a Fun-Control model, from control latents and any image latents."""
    control = batch.tensor("latents_control").float()
    if control.shape[1] != LATENT.channels:
        raise CacheError(
            f"{batch.keys[0]}: its control is cached for VACE. Cache again with wan_cache_latents.py, "
            "without --vace."
        )
    image = batch.tensor("latents_image").float() if task.requires_image else None
    return control_channels(task, control, image)


def _read_features(task: WanTask, config: WanConfig, batch: Batch) -> Tensor:
    """Return a batch's CLIP features; raise CacheError if they come from the wrong number of images."""
    # A model with position embeddings for images needs two images, others one.
    clip = batch.tensor("clip")
    positions = config.image_positions
    if positions:
        fits = clip.shape[1] == positions
        options, images = "--clip --flf2v", "two images"
    else:
        fits = clip.shape[1] != 2 * CLIP_TOKENS
        options, images = "--clip, without --flf2v", "one image"
    if fits:
        return clip
    raise CacheError(
        f"{batch.keys[0]}: the cached CLIP features have {clip.shape[1]} rows, but --task {task.name} needs "
        f"{positions or CLIP_TOKENS}, of {images}. Cache again with wan_cache_latents.py {options}."
    )


def no_features(
    config: WanConfig, batch_size: int, device: torch.device | None = None
) -> dict[str, Tensor | list[Tensor]]:
    """Return {"clip": zeros}, B T D, in place of CLIP features; on the CPU if `device` is None."""
    return {"clip": torch.zeros(batch_size, CLIP_TOKENS, config.image_dim, device=device)}
