"""The items of a prepared folder: their names, their files, and which of these are there already."""

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.caching.given_tensors import embeds_note
from dataset.sources.cogvideox import CogRow
from dataset.sources.media_source import EMBEDS, IMAGE_MOMENTS, MOMENTS
from modules.text_files import parse_json, read_text

FOLDERS = ("images", IMAGE_MOMENTS, "videos", MOMENTS, "prompts", EMBEDS)


@dataclass(frozen=True)
class PreparedItem:
    """One clip and the files that are made of it; `videos/NAME.txt` and `prompts/NAME.txt` come last."""

    name: str
    caption: str  # one line
    source: Path
    folder: Path

    @property
    def image(self) -> Path:
        return self.folder / "images" / f"{self.name}.png"

    @property
    def image_moments(self) -> Path:
        return self.folder / IMAGE_MOMENTS / f"{self.name}.pt"

    @property
    def video(self) -> Path:
        return self.folder / "videos" / f"{self.name}.mp4"

    @property
    def facts(self) -> Path:
        return self.folder / "videos" / f"{self.name}.txt"

    @property
    def moments(self) -> Path:
        return self.folder / MOMENTS / f"{self.name}.pt"

    @property
    def prompt(self) -> Path:
        return self.folder / "prompts" / f"{self.name}.txt"

    @property
    def embeds(self) -> Path:
        return self.folder / EMBEDS / f"{self.name}.pt"

    def media_files(self, latents: bool, image_latents: bool) -> list[Path]:
        """Return the files of the clip, in the order in which they are written."""
        files = [self.video, self.image]
        files += [self.moments] if latents else []
        files += [self.image_moments] if image_latents else []
        return [*files, self.facts]

    def has_media(self, latents: bool, image_latents: bool) -> bool:
        """Whether the files of the clip are there, and newer than the clip."""
        if not all(path.exists() for path in self.media_files(latents, image_latents)):
            return False
        try:
            self.read_facts()
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return self.source.is_dir() or self.source.stat().st_mtime_ns <= self.facts.stat().st_mtime_ns

    def has_texts(self, embeds: bool) -> bool:
        """Whether the files of the caption are there, and of this caption."""
        if embeds and not (self.embeds.exists() and embeds_note(self.embeds).exists()):
            return False
        try:
            return read_text(self.prompt) == self.caption
        except (OSError, ValueError):
            return False

    def read_facts(self) -> dict[str, Any]:
        """Return num_frames, height and width. Raises OSError, ValueError, KeyError or TypeError."""
        found = parse_json(read_text(self.facts))
        return {key: int(found[key]) for key in ("num_frames", "height", "width")}


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
        files = {
            "prompt_embed": item.embeds,
            "image": item.image,
            "image_latent": item.image_moments,
            "video": item.video,
            "video_latent": item.moments,
        }
        places = {
            key: path.relative_to(item.folder).as_posix() if path.exists() else None
            for key, path in files.items()
        }
        record = {"prompt": item.caption, **places, "metadata": dict(facts)}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return {
        "prompts.txt": "".join(f"{item.caption}\n" for item, _ in items),
        "videos.txt": "".join(f"videos/{item.name}.mp4\n" for item, _ in items),
        "data.jsonl": "".join(lines),
    }
