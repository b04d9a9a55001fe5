"""Families that cut a clip into sections, one file each: all of them are there, or all are made again."""

from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.report.check import check_caching
from dataset.batches.items import find_items
from dataset.batches.reading import read_batch
from dataset.cache.files import write_tensors
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import DatasetConfig
from modules.errors import CacheError, DatasetError
from tests.dataset.caching.test_loop import change, make_config
from tests.dataset.making import make_clip, make_table
from tests.dataset.toy_family import LATENT, ToyFamily, options


def section_names(count: int, stem: str = "clip_0", frames: int = 5) -> list[str]:
    return [f"{stem}_00000-{frames:03d}-{section:04d}_0032x0032_toy.safetensors" for section in range(count)]


def cached(folder: Path, sections: int = 3, **changes: Any) -> DatasetConfig:
    config = make_config(folder, **({"clips": (5,), "fp_latent_window_size": 2} | changes))
    cache_media(ToyFamily(sections=sections), config, options())
    cache_texts(ToyFamily(), config, options())
    return config


# Caching


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_one_missing_section_makes_all_again(
    tmp_path: Path, gone: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = cached(tmp_path)
    (tmp_path / "cache" / section_names(3)[gone]).unlink()
    with caplog.at_level("INFO"):
        assert cache_media(ToyFamily(sections=3), config, options()).written == 3
    left = ", ".join(str(section) for section in range(3) if section != gone)
    assert f"sections {left} were found, 3 files belong together" in caplog.text
    assert cache_media(ToyFamily(sections=3), config, options()).kept == 3


def test_the_keys_of_sections_make_files_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = cached(tmp_path)
    with caplog.at_level("INFO"):
        assert (
            cache_media(ToyFamily(sections=3), change(config, fp_latent_window_size=9), options()).written
            == 3
        )
    assert "fp_latent_window_size was 2, is now 9" in caplog.text


def test_a_table_that_cannot_be_cached_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    family = ToyFamily(refuses="it is no good")
    with pytest.raises(DatasetError, match=r"data\.toml, \[\[datasets\]\] 1 .*: it is no good"):
        cache_media(family, config, options())
    assert (family.loaded, family.seen, (tmp_path / "cache").exists()) == (0, [], False)
    result = check_caching(family, config, 1, False)
    assert result.exit_code == 1
    assert "it is no good" in "\n".join(result.lines)


# What families are told


# Training


def test_sections_of_other_programs_are_as_long_as_the_window(tmp_path: Path) -> None:
    table = make_table(tmp_path, fp_latent_window_size=2)
    table.cache_directory.mkdir()
    make_clip(tmp_path / "a.mp4", 5)
    text = {"varlen_t5_float16": torch.ones(4, 4)}
    write_tensors(
        table.cache_directory / "a_toy_te.safetensors", text, {"architecture": "toy", "caption1": "a text"}
    )
    for section, frames in enumerate((2, 9)):
        tensors = {f"latents_{frames}x4x4_float16": torch.ones(2, frames, 4, 4)}
        write_tensors(
            table.cache_directory / section_names(2, "a", 17)[section], tensors, {"architecture": "toy"}
        )
    good, bad = find_items(DatasetConfig(table.config_path, (table,)), "toy", LATENT).items
    assert read_batch([good], LATENT).tensor("latents").shape == (1, 2, 2, 4, 4)
    with pytest.raises(CacheError, match="shape 2x9x4x4, .* asks for 2x2x4x4"):
        read_batch([bad], LATENT)
