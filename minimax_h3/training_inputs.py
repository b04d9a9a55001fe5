"""Training inputs in addition to a noised clip and its text, and the additional inputs of a teacher.

Keyframes and references get new noise in each step. Names are those of caches; see conditions.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minimax_h3.cache_marks import TEACHER_KEYS, read_teacher_texts
from minimax_h3.conditions import (
    CONTROL,
    CONTROL_INDICES,
    FIRST,
    LAST,
    REFERENCE,
    TARGET_INDEX,
    add_condition_noise,
    is_visual,
    reference_key,
    sort_condition_keys,
)
from minimax_h3.configs import PATCH
from minimax_h3.model import IMAGE_CLEAN_FRACTION
from minimax_h3.presentation import AUDIO, IMAGE, VIDEO
from minimax_h3.training_options import CONDITION_SET_BY_TASK, name_teacher_conditions
from modules.errors import CacheError
from protocols.data import AUDIO_LATENTS, HAS_AUDIO, Batch, Conditions
from protocols.inputs import CLIP, FIRST_LAST, SUBJECT

LATENTS_AGAIN = "minimax_h3_cache_latents.py"
# keys of the clip itself, as the reference of its teacher
CLIP_AS_REFERENCE, AUDIO_AS_REFERENCE = "taught_latents", "taught_sound"

CLEAN_FRACTIONS = "clean_shares"  # in conditions of a training run: `CleanFractions`, 2 float32 on the host


class CleanFractions(NamedTuple):
    """Fraction of clean signal in conditions on images and on audio; noise makes up the rest."""

    visual: float  # of images and clips
    audio: float


def read_clean_fractions(cond: Conditions) -> CleanFractions:
    """Return the fractions of clean signal in a pass's conditions; by default the released ones."""
    fractions = cond.get(CLEAN_FRACTIONS)
    if not isinstance(fractions, Tensor):
        return CleanFractions(IMAGE_CLEAN_FRACTION, 1.0)
    # float32 stores 0.999 as 0.99900001
    visual, audio = (round(fraction, 6) for fraction in fractions.tolist())
    return CleanFractions(visual, audio)


def add_noise_to_inputs(
    clean_fractions: CleanFractions, tensors: Conditions, condition_set: str, generator: torch.Generator
) -> Conditions:
    """Add noise to a batch's keyframes and references, as the model expects them.

    A teacher with the condition set CLIP also gets the noised clip and its audio, as references.
    """
    noised = dict(tensors)
    for key in sort_condition_keys(tensors):
        fraction = clean_fractions.visual if is_visual(key) else clean_fractions.audio
        noised[key] = _add_noise(_read_tensor(tensors, key), fraction, generator)
    if condition_set == CLIP:
        clip, audio = _read_tensor(tensors, "latents"), _read_tensor(tensors, AUDIO_LATENTS)
        noised[CLIP_AS_REFERENCE] = _add_noise(clip, clean_fractions.visual, generator)
        noised[AUDIO_AS_REFERENCE] = _add_noise(audio, clean_fractions.audio, generator)
    return noised


def _add_noise(latents: Tensor, clean_fraction: float, generator: torch.Generator) -> Tensor:
    latents = latents.float()
    if clean_fraction == 1:
        return latents
    noise = torch.randn(latents.shape, generator=generator)
    return add_condition_noise(latents, noise, clean_fraction)


def _read_tensor(tensors: Conditions, key: str) -> Tensor:
    tensor = tensors[key]
    assert isinstance(tensor, Tensor), "only texts have different lengths"
    # in caches with sizes in tensor names, audio has an additional axis of frames
    return tensor.squeeze(2) if key.endswith(AUDIO) and tensor.ndim > 4 else tensor


def teacher_rows(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Return states and token tags of the teacher's text; raise CacheError if they are missing."""
    return read_teacher_texts(batch, name_teacher_conditions(batch.condition_set))


def teacher_key(condition_set: str) -> str:
    """Return the cache key for the text states of a teacher that gets the conditions `condition_set`."""
    return TEACHER_KEYS[name_teacher_conditions(condition_set)].states


def media_conditions(batch: Batch, task: str, latents: Tensor) -> dict[str, Tensor]:
    """Return a batch's keyframes, references and time positions, by cache key.

    Args:
        batch: The batch; in a teacher's pass, with the media that the teacher sees.
        task: Task of the training run.
        latents: Latents of the clip, in model space.

    Raises:
        CacheError: If conditions are missing, or do not fit the network.
    """
    tensors = batch.tensors
    # `batch.condition_set` says what a teacher sees instead of the task's media; "" in an ordinary pass
    condition_set = batch.condition_set or CONDITION_SET_BY_TASK.get(task)
    if condition_set == CLIP:
        return {**_use_clip_as_reference(tensors, latents), **_read_time_indices(tensors)}
    keys: list[str] = []
    if condition_set == FIRST_LAST:
        keys = [key for key in sort_condition_keys(tensors) if not key.startswith(REFERENCE)]
        _require_conditions(batch, task, keys, (FIRST, LAST))
    elif condition_set == SUBJECT:
        keys = [key for key in sort_condition_keys(tensors) if key.startswith(REFERENCE)]
        _require_conditions(batch, task, keys, ("latents_ref_000_...",))
    media: dict[str, Tensor] = {}
    for key in keys:
        media[key] = _read_tensor(tensors, key)
        # Raise CacheError if a cached condition, images or audio, has a shape that the network cannot use
        condition = media[key]
        if is_visual(key):  # B Z F H W
            fits = (
                condition.ndim == 5
                and condition.shape[1] == latents.shape[1]
                and condition.shape[3] % PATCH == condition.shape[4] % PATCH == 0
            )
        else:  # B Z 2 A
            clip_audio = batch.tensors.get(AUDIO_LATENTS)
            channels = clip_audio.shape[1] if isinstance(clip_audio, Tensor) else latents.shape[1]
            fits = condition.ndim == 4 and condition.shape[1:3] == (channels, 2)
        if not fits or not condition.is_floating_point():
            raise CacheError(
                f"{batch.keys[0]}: {key} in its cache is {list(condition.shape[1:])}, which the network does "
                f"not support. Cache again with {LATENTS_AGAIN}."
            )
    return {**media, **_read_time_indices(tensors)}


def _read_time_indices(tensors: Conditions) -> dict[str, Tensor]:
    """Return the time positions of an image and its control images; {} if the cache has none."""
    return {key: _read_tensor(tensors, key) for key in (TARGET_INDEX, CONTROL_INDICES) if key in tensors}


def _require_conditions(batch: Batch, task: str, keys: list[str], names: tuple[str, ...]) -> None:
    """Raise CacheError if a cache lacks conditions that the task, or a teacher's keyframes, need."""
    missing = [name for name in names if name not in keys]
    has_enough = any(key.startswith((CONTROL, REFERENCE)) for key in keys)
    if not has_enough and missing and (batch.condition_set or not keys):
        taker = f"--task {task}"
        if batch.condition_set:
            taker = f"teacher matching with {name_teacher_conditions(batch.condition_set)}"
        caching_task = "fl2va" if names == (FIRST, LAST) else "ref2va"
        raise CacheError(
            f"{batch.keys[0]}: its cache has no {' and no '.join(missing)}, which {taker} needs. Cache again "
            f"with {LATENTS_AGAIN} --task {caching_task}."
        )


def _use_clip_as_reference(tensors: Conditions, latents: Tensor) -> dict[str, Tensor]:
    """Return conditions in which a clip, with its audio if any, is its own reference."""
    clip = tensors.get(CLIP_AS_REFERENCE, latents)  # noised, except for a check of caches
    assert isinstance(clip, Tensor)
    if clip.shape[2] == 1:
        return {reference_key(0, IMAGE): clip}
    media = {reference_key(0, VIDEO): clip}
    if bool(_read_tensor(tensors, HAS_AUDIO).all()):
        media[reference_key(0, AUDIO)] = _read_tensor(
            tensors, AUDIO_AS_REFERENCE if CLIP_AS_REFERENCE in tensors else AUDIO_LATENTS
        )
    return media
