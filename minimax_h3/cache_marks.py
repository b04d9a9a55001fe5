"""Marks in the metadata of text caches that record their task, and the checks in training.

The states of a caption depend on what the text encoder saw with it: nothing, the first and the last frame of
the clip, or references. Names and values are those of other trainers' caches.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoints.opening import open_checkpoint
from checkpoints.writing import save_tensors
from minimax_h3.options import NAME
from modules.errors import CacheError, CheckpointError
from protocols.data import Batch

logger = logging.getLogger(__name__)

KEY, TAGS = "mmh3_hidden_states", "mmh3_token_tags"
TEXTS_AGAIN = "minimax_h3_cache_text_encoder_outputs.py"
FORMAT = "minimax-h3-text-v2"  # format of text caches, named as in musubi-tuner
PROBE_FORMAT = "h3-uncond-probe-v1"  # format of the files of --uncond_output
TASK, FORMAT_KEY, TEACHER = "task", "cache_format", "teacher_conditions"  # in metadata
IMAGE_TAG = 0  # of tokens in vision blocks; tokens of text have 1


class TextKeys(NamedTuple):
    """Keys in a cache file: the text encoder's states, and the tags of their tokens."""

    states: str
    tags: str


# --teacher_conditions -> keys of the text that a teacher is given
TEACHER_KEYS: Mapping[str, TextKeys] = {
    "first,last": TextKeys("mmh3_teacher_hidden_states", "mmh3_teacher_token_tags"),
    "ref": TextKeys("mmh3_teacher_ref_hidden_states", "mmh3_teacher_ref_token_tags"),
    "subject_ref": TextKeys("mmh3_teacher_subject_ref_hidden_states", "mmh3_teacher_subject_ref_token_tags"),
}


def make_cache_metadata(
    task: str, teacher: str | None, caption: str, media_hashes: Sequence[str]
) -> dict[str, str]:
    """Return a text cache's metadata; `media_hashes` are of the media shown with the caption."""
    presented = json.dumps(
        {"task": task, "teacher": teacher, "caption": caption, "shown": list(media_hashes)}
    )
    return {
        TASK: task,
        FORMAT_KEY: FORMAT,
        TEACHER: teacher or "",
        "presentation_fingerprint": f"sha256:{hashlib.sha256(presented.encode()).hexdigest()}",
    }


def check_cache_metadata(path: Path | str, metadata: Mapping[str, str], task: str) -> None:
    """Raise CacheError if a text cache was made for another task, or in another format.

    A cache that records neither its task nor its format is accepted.
    """
    # the task of this run as the default: a missing record counts as a match
    cached_task = metadata.get(TASK, task)
    if cached_task != task:
        raise CacheError(
            f"{path}: the text is cached for --task {cached_task:.20}, but this run uses --task {task}, "
            f"for which the text encoder reads other images with it. Cache again with {TEXTS_AGAIN} --task "
            f"{task}, or use a cache folder for each task."
        )
    cached_format = metadata.get(FORMAT_KEY, FORMAT)
    if cached_format != FORMAT:
        raise CacheError(
            f"{path}: the text is cached in the format {cached_format:.40}, but {FORMAT} is needed. Cache "
            f"again with {TEXTS_AGAIN}."
        )


def check_texts(batch: Batch, task: str) -> None:
    """Raise CacheError unless a batch's texts were cached for the task of this training run.

    The task is in the cache's metadata, also in caches of other trainers. The token tags must match it, too.
    """
    for key, metadata in zip(batch.keys, batch.text_metadata, strict=False):
        check_cache_metadata(key, metadata, task)
    for index, key in enumerate(batch.keys):
        if not (batch.has_empty_text and batch.has_empty_text[index]):
            _check_tags(key, batch.tensors[TAGS][index], len(batch.tensors[KEY][index]), task)


def _check_tags(key: str, tags: Tensor, num_states: int, task: str) -> None:
    """Raise CacheError if token tags do not match the number of states, or do not fit the task."""
    if (
        tags.is_floating_point()
        or tags.shape != (num_states,)
        or not torch.isin(tags, torch.tensor([0, 1])).all()
    ):
        raise CacheError(
            f"{key}: {TAGS} in its cache must hold a 0 or 1 for each of its {num_states} rows. Cache again "
            f"with {TEXTS_AGAIN} --task {task}."
        )
    has_images = bool((tags == IMAGE_TAG).any())
    if has_images == (task == "t2va"):
        seen = "with images" if has_images else "without images"
        raise CacheError(
            f"{key}: its caption was encoded {seen}, which does not fit --task {task}. Cache "
            f"again with {TEXTS_AGAIN} --task {task}."
        )


def read_teacher_texts(batch: Batch, conditions: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return the cached text states that the teacher gets instead of the batch's captions.

    Args:
        batch: The batch.
        conditions: What the teacher sees besides the caption, a key of `TEACHER_KEYS` such as "first,last".

    Returns:
        The states, n C, and the tags, n, of each sample; n is the number of its tokens.

    Raises:
        CacheError: If the caches do not have these texts, or if they are damaged.
    """
    keys = TEACHER_KEYS[conditions]
    missing = [key for key in keys if key not in batch.tensors]
    if missing:
        cached_conditions = [
            other for other, other_keys in TEACHER_KEYS.items() if other_keys.states in batch.tensors
        ]
        # tell which other conditions the cache was made for
        others = f" (it has those of {cached_conditions[0]})" if cached_conditions else ""
        raise CacheError(
            f"{batch.keys[0]}: its cache has no teacher rows, {missing[0]}{others}, which {NAME}'s teacher "
            f"matching needs. Cache again with {TEXTS_AGAIN} --task t2va --teacher_conditions {conditions}."
        )
    states, tags = (list(batch.tensors[key]) for key in keys)
    task = "fl2va" if conditions == "first,last" else "ref2va"  # the task with a text of this kind
    for sample_states, sample_tags in zip(states, tags, strict=True):
        _check_tags(batch.keys[0], sample_tags, len(sample_states), task)
    return states, tags


def save_empty_prompt(path: Path, tensors: Mapping[str, Tensor], text: str) -> None:
    """Write the empty prompt's states in the file format of other trainers.

    `tensors` are the contents of a text cache for the prompt `text`.
    """
    tensors = {"hidden_states": tensors[KEY], "token_tags": tensors[TAGS]}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors, {FORMAT_KEY: PROBE_FORMAT, "text": text})
    logger.info("states of the empty prompt %r: %s", text, path)


def read_empty_prompt(path: Path) -> tuple[Tensor, Tensor]:
    """Return the states, n C, and the token tags, n, in a file that --uncond_output wrote.

    Raises CacheError for any other file.
    """
    try:
        with open_checkpoint(path) as checkpoint:
            found_format = checkpoint.metadata.get(FORMAT_KEY)
            names = ("hidden_states", "token_tags")
            if found_format != PROBE_FORMAT or not checkpoint.tensors.keys() >= {*names}:
                raise CacheError(
                    f"{path}: these are not the states of an empty prompt ({FORMAT_KEY} is {found_format}). "
                    f"Make them with {TEXTS_AGAIN} --uncond_output."
                )
            states, tags = map(checkpoint.read, names)
    except CheckpointError as error:
        raise CacheError(f"{error} Make the file with {TEXTS_AGAIN} --uncond_output.") from error
    if states.ndim != 2 or not len(states) or not states.is_floating_point():
        raise CacheError(
            f"{path}: hidden_states is {states.dtype} {list(states.shape)}, not a state for each token. Make "
            f"the file with {TEXTS_AGAIN} --uncond_output."
        )
    _check_tags(str(path), tags, len(states), "t2va")
    return states, tags
