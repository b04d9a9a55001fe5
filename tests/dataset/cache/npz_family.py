"""A toy family whose caches other trainers keep in npz files, with its pictures."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dataset.batches.items import find_items, require_items
from dataset.batches.reading import read_batch
from dataset.cache.store import Stores
from dataset.caching.existing import npz_names
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import DatasetConfig
from modules.contract.data import Batch, CacheEntry, LatentSpec, MediaBatch, MediaEncoders
from modules.contract.rules import NpzFormat
from tests.dataset.making import make_table
from tests.dataset.toy_family import LATENT, ToyFamily, options

FORMAT = NpzFormat(
    "_toy",
    "_toy_te",
    constants={"applies_mask": True},
    zeros={"places": ("t5", 3), "pooled": ("", 7)},
    variable_length=frozenset({"t5"}),
)
NPZ_LATENT = dataclasses.replace(LATENT, npz=FORMAT, in_sections=False)


@dataclasses.dataclass
class NpzFamily(ToyFamily):
    """Latents are bfloat16 and depend on where a pixel is, so that sides and sizes differ."""

    latent: LatentSpec = NPZ_LATENT

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        self.seen.append(media.keys)
        pixels = media.frames.float().mean(-1) / 255  # B F H W
        # no operation that starts threads: a test forks this process
        small = pixels.unflatten(3, (-1, 8)).mean(4).unflatten(2, (-1, 8)).mean(3)
        latents = torch.stack([small, -small], 1).bfloat16()
        return [[CacheEntry({"latents": one})] for one in latents]


def make_pictures(folder: Path, count: int = 3, size: tuple[int, int] = (40, 40)) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        path = folder / f"pic {number}.png"
        path.with_suffix(".txt").write_text("picture " * (number + 1), encoding="utf-8")
        generator = np.random.default_rng(number)
        Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    return folder


def make_config(folder: Path, form: str = "npz", **changes: Any) -> DatasetConfig:
    """One table of the pictures; its npz files are beside them, its others in `cache`."""
    return of_tables(folder, [{"cache_format": form, **changes}])


def of_tables(folder: Path, tables: Sequence[Mapping[str, Any]]) -> DatasetConfig:
    usual = {"resolution": (32, 32), "caption_extension": ".txt", "batch_size": 2}
    found = []
    for index, changes in enumerate(tables):
        place = folder if changes.get("cache_format") == "npz" else folder / "cache"
        fields = {"cache_directory": place, "index": index, **usual, **changes}
        found.append(make_table(folder, "image_directory", **fields))
    return DatasetConfig(folder / "data.toml", tuple(found))


def cache(config: DatasetConfig, family: ToyFamily | None = None) -> tuple[int, int]:
    """Cache all; how many latents and texts were written."""
    family = family or NpzFamily()
    return cache_media(family, config, options()).written, cache_texts(family, config, options()).written


def read_all(config: DatasetConfig, stores: Stores | None = None, **more: Any) -> list[Batch]:
    """Each item alone, as training reads it."""
    family = NpzFamily()
    stores = stores or Stores(npz_names(family))
    found = find_items(config, family.cache_tag, family.latent, family.text_keys, stores)
    return [read_batch([item], family.latent, stores=stores, **more) for item in require_items(found)]


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches have equal tensors, bit for bit, of equal dtypes."""

    def flat(batch: Batch) -> list[tuple[str, torch.Tensor]]:
        pairs = [(name, value) for name, value in sorted(batch.tensors.items())]
        return [
            (name, one) for name, value in pairs for one in (value if isinstance(value, list) else [value])
        ]

    pairs = list(zip(flat(one), flat(other), strict=True))
    return all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)
