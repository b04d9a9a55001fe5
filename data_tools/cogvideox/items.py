"""The items of a prepared folder: their names, which of their files are there, and how these are written.

Each file is written completely or not at all; `videos/NAME.txt` and `prompts/NAME.txt` come last.
"""

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataset.caching.existing import describe_embeds, embeds_note
from dataset.caching.latents import require_finite
from dataset.sources.cogvideox import CogRow
from dataset.sources.media_source import EMBEDS, IMAGE_MOMENTS, MOMENTS
from modules.atomic_write import atomic_path, write_text
from modules.media.writing import write_png, write_video
from modules.text_files import parse_json, read_text

IMAGES, VIDEOS, PROMPTS = "images", "videos", "prompts"
FOLDERS = (IMAGES, IMAGE_MOMENTS, VIDEOS, MOMENTS, PROMPTS, EMBEDS)
SUFFIXES = {IMAGES: ".png", VIDEOS: ".mp4", PROMPTS: ".txt"}  # of all others: .pt
# in data.jsonl
KEYS = {
    "prompt_embed": EMBEDS,
    "image": IMAGES,
    "image_latent": IMAGE_MOMENTS,
    "video": VIDEOS,
    "video_latent": MOMENTS,
}


@dataclass(frozen=True)
class PreparedItem:
    """One clip and the files that are made of it."""

    name: str
    caption: str  # one line
    source: Path
    folder: Path

    def file(self, kind: str) -> Path:
        """Return its file in a folder of FOLDERS."""
        return self.folder / kind / f"{self.name}{SUFFIXES.get(kind, '.pt')}"

    @property
    def facts(self) -> Path:
        return self.file(VIDEOS).with_suffix(".txt")

    def read_facts(self) -> dict[str, Any]:
        """Return num_frames, height and width. Raises OSError, ValueError, KeyError or TypeError."""
        found = parse_json(read_text(self.facts))
        return {key: int(found[key]) for key in ("num_frames", "height", "width")}

    def has_media(self, latents: bool, image_latents: bool) -> bool:
        """Whether the files of the clip are there, and newer than the clip."""
        kinds = [VIDEOS, IMAGES, *([MOMENTS] if latents else []), *([IMAGE_MOMENTS] if image_latents else [])]
        try:
            self.read_facts()
        except (OSError, ValueError, KeyError, TypeError):
            return False
        is_newer = self.source.is_dir() or self.source.stat().st_mtime_ns <= self.facts.stat().st_mtime_ns
        return is_newer and all(self.file(kind).exists() for kind in kinds)

    def has_texts(self, embeds: bool) -> bool:
        """Whether the files of the caption are there, and of this caption."""
        path = self.file(EMBEDS)
        if embeds and not (path.exists() and embeds_note(path).exists()):
            return False
        try:
            return read_text(self.file(PROMPTS)) == self.caption
        except (OSError, ValueError):
            return False


def name_items(rows: Sequence[CogRow], root: Path, folder: Path, seed: int) -> list[PreparedItem]:
    """Return the items of all rows, in order.

    A name is a UUID made of the seed, the path of the clip, and the number of the row of that clip: a rerun,
    and one after rows were added, finds its files again.
    """
    seen: Counter[Path] = Counter()
    items = []
    for row in rows:
        seen[row.video] += 1
        inside = row.video.relative_to(root) if row.video.is_relative_to(root) else row.video
        text = json.dumps([seed, inside.as_posix(), seen[row.video]])
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        name = str(uuid.UUID(bytes=digest[:16], version=4))
        items.append(PreparedItem(name, " ".join(row.caption.splitlines()), row.video, folder))
    return items


def list_texts(items: Sequence[tuple[PreparedItem, Mapping[str, Any]]]) -> dict[str, str]:
    """Return the lists of finished items by file name: prompts.txt, videos.txt and data.jsonl.

    items: with their facts. Missing files are null in data.jsonl.
    """
    lines = []
    for item, facts in items:
        files = {key: item.file(kind) for key, kind in KEYS.items()}
        places = {
            key: path.relative_to(item.folder).as_posix() if path.exists() else None
            for key, path in files.items()
        }
        record = {"prompt": item.caption, **places, "metadata": dict(facts)}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return {
        "prompts.txt": "".join(f"{item.caption}\n" for item, _ in items),
        "videos.txt": "".join(f"{VIDEOS}/{item.name}.mp4\n" for item, _ in items),
        "data.jsonl": "".join(lines),
    }


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
    write_video(item.file(VIDEOS), list(frames), fps)
    write_png(item.file(IMAGES), frames[0])
    for kind, tensor in ((MOMENTS, moments), (IMAGE_MOMENTS, image_moments)):
        if tensor is None:
            item.file(kind).unlink(missing_ok=True)  # of the clip as it was before
        else:
            save_pickled(item.file(kind), tensor)
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
    path = item.file(EMBEDS)
    item.file(PROMPTS).unlink(missing_ok=True)
    if tensors:
        save_pickled(path, next(iter(tensors.values())) if len(tensors) == 1 else tensors)
        note = describe_embeds(item.caption, architecture, identities, tensors)
        write_text(embeds_note(path), json.dumps(note, ensure_ascii=False, sort_keys=True))
    else:  # those that are there are of the caption as it was before
        path.unlink(missing_ok=True)
        embeds_note(path).unlink(missing_ok=True)
    write_text(item.file(PROMPTS), item.caption)
