"""Check the tensors from caches, and map them to arguments of the transformer."""

import logging
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from frame_pack.configs import FramePackConfig
from frame_pack.files import FRAMEPACK_CLIP, FramePackLlama
from modules.errors import CacheError
from protocols.data import Batch, Conditions

logger = logging.getLogger(__name__)


class HistoryInput(NamedTuple):
    """Names that belong to cached latents of earlier frames."""

    argument: str  # argument of the transformer for the latents
    indices: str  # cache key, and argument, of their frame indices


# cache key of latents of earlier frames, in three resolutions
HISTORY = {
    "latents_clean": HistoryInput("clean_latents", "clean_latent_indices"),
    "latents_clean_2x": HistoryInput("clean_latents_2x", "clean_latent_2x_indices"),
    "latents_clean_4x": HistoryInput("clean_latents_4x", "clean_latent_4x_indices"),
}
TEXT_KEYS = FramePackLlama.default_settings.keys | FRAMEPACK_CLIP.keys
LATENTS_AGAIN = "fpack_cache_latents.py"
TEXTS_AGAIN = "fpack_cache_text_encoder_outputs.py"
_NEEDED = ("latent_indices", "image_embeddings")


def read_conditions(batch: Batch, config: FramePackConfig, dit: Path) -> Conditions:
    """Check a batch's cached text, image, indices and history, and return them by cache key.

    The history contains earlier frames in three resolutions. Each may be missing, or have indices without
    latents, which stand for black frames.

    Args:
        batch: Batch from the caches.
        config: Dimensions of the transformer.
        dit: File of the transformer, for messages.

    Raises:
        CacheError: If a tensor is missing or does not fit the others. The message names the item and the
            command to run.
    """
    batch.check(dict.fromkeys(sorted(TEXT_KEYS), TEXTS_AGAIN), "the transformer")
    texts = {"llama_vec": config.text_dim, "clip_l_pooler": config.pooled_dim}
    batch.check_widths(texts, dit, f"{TEXTS_AGAIN} and the text encoders of HunyuanVideo")
    batch.check(dict.fromkeys(_NEEDED, LATENTS_AGAIN), "the transformer")
    batch.check_widths(
        {"image_embeddings": config.image_dim},
        dit,
        f"{LATENTS_AGAIN} and the SigLIP image encoder of FramePack",
    )
    names = ["latents", *sorted(TEXT_KEYS), *_NEEDED]
    for latents, history in HISTORY.items():
        names += [name for name in (latents, history.indices) if name in batch.tensors]
    tensors = {name: batch.tensor(name) for name in names}
    _check_indices(batch, tensors, "latents", "latent_indices")
    for latents, history in HISTORY.items():
        if latents in tensors:
            _check_indices(batch, tensors, latents, history.indices)
    del tensors["latents"]  # needed only for the checks
    return tensors


def _check_indices(batch: Batch, tensors: Mapping[str, Tensor], latents: str, indices: str) -> None:
    """Raise CacheError if frame indices of cached latents are missing, or do not fit them or the target."""
    # `latents` and `indices` are the names of the two tensors in caches.
    if indices not in tensors:
        raise CacheError(
            f"{batch.keys[0]}: the cache has {latents} without {indices}. Cache again with {LATENTS_AGAIN}."
        )
    target = tensors["latents"]
    stored = tensors[indices]
    _, _, frames, *area = tensors[latents].shape
    has_all_frame_indices = stored.shape == (len(target), frames)
    has_target_size = area == list(target.shape[3:])
    if stored.dtype.is_floating_point or not has_all_frame_indices or not has_target_size:
        raise CacheError(
            f"{batch.keys[0]}: {indices} of shape {_format_shape(stored)} ({stored.dtype}) and {latents} "
            f"of {_format_shape(tensors[latents])} do not fit latents of {_format_shape(target)}. Cache "
            f"again with {LATENTS_AGAIN}."
        )


def warn_about_section_order(batch: Batch, is_f1: bool, one_frame: bool) -> None:
    """Warn once if caches were made for the other section order than the samples use (with or without --f1).

    Both orders have the same cache keys. F1 generates sections forward in time, so the clean neighboring
    frame precedes the section; otherwise it follows the section. Images have no sections.

    Args:
        batch: Batch from the caches.
        is_f1: Whether samples use --f1.
        one_frame: Whether samples use --one_frame.
    """
    if one_frame and batch.tensor("latents").shape[2] > 1:
        _warn_of_cached_clips()
        return
    # images have no coarse history
    if not {"latents_clean_2x", "clean_latent_indices"} <= batch.tensors.keys():
        return
    # the last clean frame is the neighbor
    neighbor_precedes = batch.tensor("clean_latent_indices")[:, -1] < batch.tensor("latent_indices")[:, 0]
    if bool((neighbor_precedes == is_f1).all()):
        return
    if is_f1:
        _warn_of_caches_without_f1()
    else:
        _warn_of_caches_with_f1()


@lru_cache  # once, not with every batch
def _warn_of_caches_without_f1() -> None:
    logger.warning(
        "--f1 is given, but the sections in the caches are not for FramePack-F1: the model would learn "
        "an order in which it does not generate. Cache again with %s --f1, or omit --f1 if --dit is "
        "FramePack.",
        LATENTS_AGAIN,
    )


@lru_cache
def _warn_of_caches_with_f1() -> None:
    logger.warning(
        "the sections in the caches are for FramePack-F1 (%s --f1), but --f1 is not given: samples are "
        "generated in a different order than the model learns. Pass --f1, or cache again without it if --dit "
        "is not F1.",
        LATENTS_AGAIN,
    )


@lru_cache
def _warn_of_cached_clips() -> None:
    logger.warning(
        "--one_frame is given, but the caches hold sections of clips: the model learns videos, and samples "
        "are images. Pass the --dataset_config whose caches were made with %s --one_frame, or omit "
        "--one_frame.",
        LATENTS_AGAIN,
    )


def _format_shape(tensor: Tensor) -> str:
    return "x".join(map(str, torch.Size(tensor.shape[1:])))
