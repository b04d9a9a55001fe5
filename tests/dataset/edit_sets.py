"""Pictures with reference pictures of several numbers and sizes, and a toy family that encodes both."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dataset.cache_files import read_entry
from dataset.caching.loop import cache_media
from dataset.caching.prefetch import CacheReport
from dataset.config import DatasetConfig, load_dataset_config, with_references
from protocols.data import CacheEntry, LatentSpec, MediaBatch, MediaEncoders
from protocols.rules import ReferenceRules
from tests.dataset.making import make_image
from tests.dataset.toy_family import ToyFamily, options

RULES = ReferenceRules(max_references=2, step=16, edits_images=True)
SIZE = (64, 48)


@dataclass
class EditFamily(ToyFamily):
    """Pictures made of reference pictures, each encoded at its own size."""

    latent: LatentSpec = LatentSpec(channels=2, stride=(1, 8, 8), pixel_step=16, frame_step=1)
    references: ReferenceRules | None = RULES

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        self.seen.append(media.keys)
        self.media.append(media)
        images = {"latents": media.frames}
        images |= {f"latents_control_{number}": one for number, one in enumerate(media.control)}
        return [
            [CacheEntry({name: self._encode(one[index]) for name, one in images.items()})]
            for index in range(len(media.keys))
        ]

    def _encode(self, frames: torch.Tensor) -> torch.Tensor:
        _, height, width, _ = frames.shape
        shape = self.latent.shape(1, height, width)[1:]
        return torch.full(shape, frames.float().mean().item(), dtype=torch.bfloat16)


def make_set(
    folder: Path, references: Mapping[str, tuple[tuple[int, int], ...]], keys: str = ""
) -> DatasetConfig:
    """Images of SIZE with captions and references of these sizes, `a_0.png`, `a_1.png` for `a`."""
    for name in ("pics", "refs"):
        (folder / name).mkdir(exist_ok=True)
    for place, (stem, sizes) in enumerate(references.items()):
        make_image(folder / "pics" / f"{stem}.png", SIZE, (10 * place, 0, 0))
        (folder / "pics" / f"{stem}.txt").write_text("make it blue", encoding="utf-8")
        for number, size in enumerate(sizes):
            if not (folder / "refs" / f"{stem}_{number}.png").exists():
                make_image(folder / "refs" / f"{stem}_{number}.png", size, (0, 20 * number + 5, 0))
    return read_set(folder, keys)


def read_set(folder: Path, keys: str = "") -> DatasetConfig:
    text = (
        f"[[datasets]]\nimage_directory = {str(folder / 'pics')!r}\ncaption_extension = '.txt'\n"
        f"control_directory = {str(folder / 'refs')!r}\ncache_directory = {str(folder / 'cache')!r}\n"
        f"resolution = {[*SIZE]}\n{keys}\n"
    )
    (folder / "data.toml").write_text(text, encoding="utf-8")
    return with_references(load_dataset_config(folder / "data.toml"), RULES)


def cache(config: DatasetConfig, **changes: Any) -> tuple[CacheReport, EditFamily]:
    family = EditFamily()
    return cache_media(family, config, options(**changes)), family


def shapes(folder: Path, stem: str) -> dict[str, tuple[int, ...]]:
    entry = read_entry(next((folder / "cache").glob(f"{stem}_0*_toy.safetensors")))
    return {name: tuple(tensor.shape) for name, tensor in entry.named.items()}
