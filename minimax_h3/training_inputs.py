"""Training inputs in addition to a noised clip and its text, and the additional inputs of a teacher.

Keyframes and references get new noise in each step. Names are those of caches; see conditions.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minimax_h3.cache_marks import TEACHER_ROWS, teacher_texts
from minimax_h3.conditions import (
    CONTROL,
    CONTROL_INDICES,
    FIRST,
    LAST,
    REFERENCE,
    TARGET_INDEX,
    add_condition_noise,
    in_order,
    is_visual,
    reference_key,
)
from minimax_h3.configs import PATCH
from minimax_h3.model import IMAGES_LIE
from minimax_h3.presentation import AUDIO, IMAGE, VIDEO
from minimax_h3.training_options import VIEWS
from modules.errors import CacheError
from protocols.data import AUDIO_LATENTS, HAS_AUDIO, Batch, Conditions
from protocols.inputs import CLIP, FIRST_LAST, SUBJECT

LATENTS_AGAIN = "minimax_h3_cache_latents.py"
# keys of the clip itself, as the reference of its teacher
TAUGHT, TAUGHT_AUDIO = "taught_latents", "taught_sound"


CLEAN = "clean_shares"  # in conditions of a training run: `Clean`, 2 float32 on the host


class Clean(NamedTuple):
    """Fraction of clean signal in conditions on images and on audio; noise makes up the rest."""

    visual: float  # noise level of images and clips
    audio: float


def clean_shares(cond: Conditions) -> Clean:
    """Return the fractions of clean signal in a pass's conditions; by default the released ones."""
    shares = cond.get(CLEAN)
    if not isinstance(shares, Tensor):
        return Clean(IMAGES_LIE, 1.0)
    # float32 stores 0.999 as 0.99900001
    visual, audio = (round(share, 6) for share in shares.tolist())
    return Clean(visual, audio)


def noise_inputs(clean: Clean, tensors: Conditions, view: str, generator: torch.Generator) -> Conditions:
    """Add noise to a batch's keyframes and references, for `NoiseSpec.change_conditions`."""
    noised = dict(tensors)
    for key in in_order(tensors):
        noised[key] = _add_noise(
            _read_tensor(tensors, key), clean.visual if is_visual(key) else clean.audio, generator
        )
    if view == CLIP:
        noised[TAUGHT] = _add_noise(_read_tensor(tensors, "latents"), clean.visual, generator)
        noised[TAUGHT_AUDIO] = _add_noise(_read_tensor(tensors, AUDIO_LATENTS), clean.audio, generator)
    return noised


def _add_noise(latents: Tensor, clean: float, generator: torch.Generator) -> Tensor:
    latents = latents.float()
    if clean == 1:
        return latents
    noise = torch.randn(latents.shape, generator=generator)
    return add_condition_noise(latents, noise, clean)


def _read_tensor(tensors: Conditions, key: str) -> Tensor:
    tensor = tensors[key]
    assert isinstance(tensor, Tensor), "only texts have different lengths"
    # in caches with sizes in tensor names, audio has an additional axis of frames
    return tensor.squeeze(2) if key.endswith(AUDIO) and tensor.ndim > 4 else tensor


def teacher_rows(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Return states and token tags of the teacher's text; raise CacheError if they are missing."""
    return teacher_texts(batch, _name_conditions(batch.condition_set))


def teacher_key(view: str) -> str:
    """Return the cache key of the text states that a teacher reads; `view` names what the teacher sees."""
    return TEACHER_ROWS[_name_conditions(view)].states


def _name_conditions(view: str) -> str:
    """Return the value of --h3_teacher_conditions for a view, the name of what a teacher sees."""
    return next(name for name, known in VIEWS.items() if known == view)


def media_conditions(batch: Batch, task: str, latents: Tensor) -> dict[str, Tensor]:
    """Return a batch's keyframes, references and time positions, by cache key.

    Args:
        batch: The batch; in a teacher's pass, with the media that the teacher sees.
        task: Task of the training.
        latents: Latents of the clip, in model space.

    Raises:
        CacheError: If conditions are missing, or do not fit the network.
    """
    tensors = batch.tensors
    # the view names what a teacher sees in place of the task's media; empty in an ordinary pass
    if batch.condition_set == CLIP:
        return {**_show_full_clip(tensors, latents), **_read_places(tensors)}
    keys: list[str] = []
    if batch.condition_set == FIRST_LAST or (not batch.condition_set and task == "fl2va"):
        keys = [key for key in in_order(tensors) if not key.startswith(REFERENCE)]
        _require(batch, task, keys, (FIRST, LAST))
    if batch.condition_set == SUBJECT or (not batch.condition_set and task == "ref2va"):
        keys = [key for key in in_order(tensors) if key.startswith(REFERENCE)]
        _require(batch, task, keys, ("latents_ref_000_...",))
    media: dict[str, Tensor] = {}
    for key in keys:
        media[key] = _read_tensor(tensors, key)
        _check_shape(batch, key, media[key], latents)
    return {**media, **_read_places(tensors)}


def _read_places(tensors: Conditions) -> dict[str, Tensor]:
    """Return the time positions of an image and its control images; {} if the cache has none."""
    return {key: _read_tensor(tensors, key) for key in (TARGET_INDEX, CONTROL_INDICES) if key in tensors}


def _require(batch: Batch, task: str, keys: list[str], names: tuple[str, ...]) -> None:
    """Raise CacheError if a batch has no cached conditions, or lacks a teacher's keyframe."""
    missing = [name for name in names if name not in keys]
    has_enough = any(key.startswith((CONTROL, REFERENCE)) for key in keys)
    if not has_enough and missing and (batch.condition_set or not keys):
        taker = f"--task {task}"
        if batch.condition_set:
            taker = f"teacher matching with {_name_conditions(batch.condition_set)}"
        task_of_cache = "fl2va" if names == (FIRST, LAST) else "ref2va"
        raise CacheError(
            f"{batch.keys[0]}: its cache has no {' and no '.join(missing)}, which {taker} needs. Cache again "
            f"with {LATENTS_AGAIN} --task {task_of_cache}."
        )


def _check_shape(batch: Batch, key: str, condition: Tensor, latents: Tensor) -> None:
    """Raise CacheError if a cached condition does not have the shape that the network takes."""
    is_sound = not is_visual(key)
    clip_audio = batch.tensors.get(AUDIO_LATENTS)
    channels = clip_audio.shape[1] if is_sound and isinstance(clip_audio, Tensor) else latents.shape[1]
    # audio is B Z 2 A, images and clips are B Z F H W
    fits = (
        condition.ndim == (4 if is_sound else 5)
        and condition.shape[1] == channels
        and condition.is_floating_point()
    )
    if fits and is_sound:
        fits = condition.shape[2] == 2
    elif fits:
        fits = not (condition.shape[3] % PATCH or condition.shape[4] % PATCH)
    if not fits:
        raise CacheError(
            f"{batch.keys[0]}: {key} in its cache is {list(condition.shape[1:])}, which the network does not "
            f"take. Cache again with {LATENTS_AGAIN}."
        )


def _show_full_clip(tensors: Conditions, latents: Tensor) -> dict[str, Tensor]:
    """Return a clip, with its audio if it has any, as a reference to itself."""
    clip = tensors.get(TAUGHT, latents)  # noised, except for a check of caches
    assert isinstance(clip, Tensor)
    if clip.shape[2] == 1:
        return {reference_key(0, IMAGE): clip}
    media = {reference_key(0, VIDEO): clip}
    if bool(_read_tensor(tensors, HAS_AUDIO).all()):
        media[reference_key(0, AUDIO)] = _read_tensor(
            tensors, TAUGHT_AUDIO if TAUGHT in tensors else AUDIO_LATENTS
        )
    return media
