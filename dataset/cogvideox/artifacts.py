"""Write the files of one item, each completely or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataset.caching.given_tensors import describe_embeds, embeds_note
from dataset.caching.latents import require_finite
from dataset.cogvideox.items import PreparedItem
from modules.atomic_write import atomic_path, write_text
from modules.media.writing import write_png, write_video


def save_pickled(path: Path, content: Tensor | Mapping[str, Tensor]) -> None:
    """Write a tensor, or tensors by name, with `torch.save`, as trainers of this form read them.

    Raises OutputError, or CacheError if a value is NaN.
    """
    tensors = {path.parent.name: content} if isinstance(content, Tensor) else content
    for key, tensor in tensors.items():
        require_finite(tensor, path.name, key)
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    # an open file: the archive in it would have the temporary file's name
    with atomic_path(path, size_bytes) as temporary, temporary.open("wb") as file:
        torch.save(content if isinstance(content, Tensor) else dict(content), file)


def write_media(
    item: PreparedItem,
    frames: NDArray[np.uint8],
    fps: int,
    moments: Tensor | None,
    image_moments: Tensor | None,
) -> None:
    """Write the results for a clip: video, first frame, moments, and last the facts that mark it as done.

    frames: F H W 3. moments, image_moments: 2C f h w, on the CPU. Raises OutputError, or CacheError if a
    value is NaN.
    """
    item.facts.unlink(missing_ok=True)  # else a kill would leave old facts beside new files
    write_video(item.video, list(frames), fps)
    write_png(item.image, frames[0])
    for path, tensor in ((item.moments, moments), (item.image_moments, image_moments)):
        if tensor is None:
            path.unlink(missing_ok=True)  # of the clip as it was before
        else:
            save_pickled(path, tensor)
    count, height, width = frames.shape[:3]
    write_text(item.facts, json.dumps({"num_frames": count, "height": height, "width": width}))
    newest = item.source.stat().st_mtime_ns
    if newest > item.facts.stat().st_mtime_ns:  # the clip's clock is ahead: else it would never be done
        os.utime(item.facts, ns=(newest, newest))


def write_texts(
    item: PreparedItem,
    architecture: str,
    identities: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write the results for a caption: embeddings, if any, their owner, and last the caption itself.

    tensors: by their keys in caches; a single one is stored alone, as trainers of this form read it. Raises
    OutputError, or CacheError if a value is NaN.
    """
    item.prompt.unlink(missing_ok=True)
    if not tensors:  # those that are there are of the caption as it was before
        for path in (item.embeds, embeds_note(item.embeds)):
            path.unlink(missing_ok=True)
    else:
        save_pickled(item.embeds, next(iter(tensors.values())) if len(tensors) == 1 else tensors)
        note = describe_embeds(item.caption, architecture, identities, tensors)
        write_text(embeds_note(item.embeds), json.dumps(note, ensure_ascii=False, sort_keys=True))
    write_text(item.prompt, item.caption)
