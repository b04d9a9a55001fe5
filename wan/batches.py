"""The conditions that a Wan transformer is trained with, from what the caches hold."""

import torch
from torch import Tensor

from modules.contract.data import Batch, Conditions
from modules.errors import CacheError
from wan.configs import WanConfig, WanTask
from wan.inputs import control_channels

CLIP_TOKENS = 257  # per image: 16 x 16 patches and the class token


def batch_conditions(
    task: WanTask, config: WanConfig, batch: Batch, zeros_on: torch.device | None
) -> Conditions:
    """Return the text, by task CLIP features, and `condition_latents` B C F H W.

    zeros_on: a model with attention to an image gets zero features where the task has none. They are made on
    this device: the host would wait for a copy. Raises CacheError, with what makes it, if something is
    missing.
    """
    needed = {"t5": "a text cache"}
    if task.has_features:
        needed |= {"clip": "wan_cache_latents.py --clip", "latents_image": "wan_cache_latents.py --clip"}
    elif task.takes_image:
        needed |= {"latents_image": "wan_cache_latents.py --i2v"}
    if task.has_control:
        needed["latents_control"] = "a dataset with control_directory"
    batch.check(needed, f"--task {task.name}")
    conditions: dict[str, Tensor | list[Tensor]] = {"t5": batch.tensors["t5"]}
    if task.has_features:
        conditions["clip"] = _check_clip(task, config, batch)
    elif zeros_on is not None:
        conditions |= no_features(config, len(batch), zeros_on)
    image = batch.tensor("latents_image").float() if task.takes_image else None
    if task.has_control:
        control = batch.tensor("latents_control").float()
        conditions["condition_latents"] = control_channels(task, control, image)
    elif image is not None:
        conditions["condition_latents"] = image
    return conditions


def no_features(
    config: WanConfig, batch_size: int, device: torch.device | None = None
) -> dict[str, Tensor | list[Tensor]]:
    """Return zero CLIP features, B T D, on the host or a device."""
    return {"clip": torch.zeros(batch_size, CLIP_TOKENS, config.image_dim, device=device)}


def _check_clip(task: WanTask, config: WanConfig, batch: Batch) -> Tensor:
    """Return the cached image features. Raises CacheError if their number of images is wrong."""
    clip, positions = batch.tensor("clip"), config.image_positions
    fits = clip.shape[1] == positions if positions else clip.shape[1] != 2 * CLIP_TOKENS
    if not fits:
        how, images = (
            ("--clip --flf2v", "two images") if positions else ("--clip, without --flf2v", "one image")
        )
        raise CacheError(
            f"{batch.keys[0]}: the cached CLIP features have {clip.shape[1]} rows, --task {task.name} needs "
            f"{positions or CLIP_TOKENS}, of {images}. Cache again with wan_cache_latents.py {how}."
        )
    return clip
