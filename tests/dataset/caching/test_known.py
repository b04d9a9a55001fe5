"""Caches that have not changed since they were verified are not read again."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.report.check import check_caching
from dataset.batches.finding import find_items
from dataset.batches.reading import read_batch
from dataset.cache.index import INDEX_NAME
from dataset.caching.loop import cache_media, cache_texts
from dataset.caching.reports import CacheReport
from dataset.config import DatasetConfig
from modules.errors import CacheError
from tests.dataset.making import make_clip, make_image, make_table
from tests.dataset.toy_family import LATENT, ToyFamily, ToyText, options

OLD_NS = 1_700_000_000_000_000_000
Cache = Callable[..., CacheReport]
HALVES = pytest.mark.parametrize(("cache", "end"), [(cache_media, "0032x0032_toy"), (cache_texts, "toy_te")])


def indexed(folder: Path, source: str = "video_directory", count: int = 3, **changes: Any) -> DatasetConfig:
    """Clips or images with captions and caches, and an index, though they are few."""
    table = make_table(
        folder, source, resolution=(32, 32), target_frames=(5,), caption_extension=".txt", **changes
    )
    for number in range(count):
        if source == "video_directory":
            make_clip(folder / f"clip_{number}.mp4", 9)
        else:
            make_image(folder / f"clip_{number}.png")
        (folder / f"clip_{number}.txt").write_text(f"clip number {number}", encoding="utf-8")
    config = DatasetConfig(table.config_path, (table,))
    for cache in (cache_media, cache_texts):
        cache(ToyFamily(), config, options())
    cache_folder = folder / "cache"
    for path in [*folder.iterdir(), *cache_folder.iterdir()]:
        os.utime(path, ns=(OLD_NS, OLD_NS))
    (cache_folder / INDEX_NAME).touch()  # where there is one it is kept
    family = ToyFamily()  # makes the latents again, as their sources have other times
    for cache in (cache_media, cache_texts):
        cache(family, config, options())
    for path in [path for path in cache_folder.iterdir() if path.name != INDEX_NAME]:
        os.utime(path, ns=(OLD_NS, OLD_NS))
    for cache in (cache_media, cache_texts):
        assert cache(family, config, options()).written == 0
    assert family.seen == []
    return config


def spoil(path: Path) -> None:
    """Change a byte behind the back of size and time."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(OLD_NS, OLD_NS))


def caches(config: DatasetConfig, end: str) -> list[Path]:
    return sorted(config.datasets[0].cache_directory.glob(f"*_{end}.safetensors"))


@HALVES
@pytest.mark.parametrize("source", ["video_directory", "image_directory"])
def test_what_has_not_changed_is_not_read(tmp_path: Path, cache: Cache, end: str, source: str) -> None:
    config = indexed(tmp_path, source)
    spoil(caches(config, end)[1])
    index = (tmp_path / "cache" / INDEX_NAME).read_bytes()
    report = cache(ToyFamily(), config, options())
    assert (report.kept, report.written) == (3, 0)  # the byte is not looked for
    for result in (
        check_caching(ToyFamily(), config, 1, False),
        check_caching(ToyFamily(), config, 1, False, parts=["texts"]),
    ):
        assert result.exit_code == 0
        assert any("3" in line and "valid, 0" in line for line in result.lines)
    assert (tmp_path / "cache" / INDEX_NAME).read_bytes() == index  # there was nothing new
    report = cache(ToyFamily(), config, options(verify=True))
    assert (report.kept, report.written) == (2, 1)


def test_training_reads_all_that_it_uses(tmp_path: Path) -> None:
    config = indexed(tmp_path)
    for end in ("0032x0032_toy", "toy_te"):
        path = caches(config, end)[0]
        data = path.read_bytes()
        spoil(path)
        with pytest.raises(CacheError, match="do not match their checksum"):
            read_batch(find_items(config, "toy", LATENT).items[:1], LATENT)
        path.write_bytes(data)


@HALVES
def test_a_changed_byte_is_found_by_the_time(tmp_path: Path, cache: Cache, end: str) -> None:
    config = indexed(tmp_path)
    path = caches(config, end)[2]
    spoil(path)
    os.utime(path)
    assert cache(ToyFamily(), config, options()).written == 1
    assert cache(ToyFamily(), config, options()).written == 0


def test_a_changed_source_caption_encoder_or_option_is_found(tmp_path: Path) -> None:
    config = indexed(tmp_path)
    make_clip(tmp_path / "clip_1.mp4", 13)
    (tmp_path / "clip_0.txt").write_text("another text!", encoding="utf-8")
    os.utime(tmp_path / "clip_0.txt", ns=(OLD_NS, OLD_NS))
    assert cache_media(ToyFamily(), config, options()).written == 1
    assert cache_texts(ToyFamily(), config, options()).written == 1
    other = ToyFamily(media_identity={"vae": "second"}, text=[ToyText(identity={"t5": "second"})])
    assert cache_media(other, config, options()).written == 3
    assert cache_texts(other, config, options()).written == 3
