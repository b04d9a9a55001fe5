from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from dataset.batches.items import CachingCommands, ItemKind, TrainingItem, find_items, require_items
from dataset.batches.order import BatchOrder, split_validation
from dataset.batches.reading import read_batch
from dataset.cache.files import write_tensors
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import DatasetConfig, DatasetTable
from modules.errors import CacheError
from tests.dataset.caching.test_loop import change, make_config
from tests.dataset.making import make_clip, make_table
from tests.dataset.toy_family import LATENT, ToyFamily, options

COMMANDS = CachingCommands("python cache_latents.py --x", "python cache_text.py --y")


def cached(folder: Path, **changes: Any) -> DatasetConfig:
    config = make_config(folder, **changes)
    cache_media(ToyFamily(), config, options())
    cache_texts(ToyFamily(), config, options())
    return config


def made_up(
    table: DatasetTable, count: int, size: tuple[int, ...] = (32, 32, 5), start: int = 0
) -> list[TrainingItem]:
    """Items without files."""
    keys = [f"clip{index:03d}" for index in range(start, start + count)]
    return [TrainingItem(key, len(key), table, size, ItemKind("toy")) for key in keys]


def test_items_are_found_by_name_alone(tmp_path: Path) -> None:
    config = cached(tmp_path, target_frames=(1, 5))
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"")  # nothing to read
    found = find_items(config, "toy", LATENT)
    assert [item.key for item in found.items] == [
        "clip_0_00000-001_0032x0032_toy",
        "clip_0_00000-005_0032x0032_toy",
        "clip_1_00000-001_0032x0032_toy",
        "clip_1_00000-005_0032x0032_toy",
    ]
    assert [item.bucket for item in found.items] == [(32, 32, 1), (32, 32, 5)] * 2
    assert found.items[0].source_stem == "clip_0"
    assert found.items[0].text_path.name == "clip_0_toy_te.safetensors"


def test_whole_clips_beside_sections_are_one_part_each(tmp_path: Path) -> None:
    table = make_table(tmp_path, fp_latent_window_size=2)
    table.cache_directory.mkdir()
    for name in ("a_00000-005_0032x0032", "b_00000-009-0000_0032x0032", "b_00000-009-0001_0032x0032"):
        (table.cache_directory / f"{name}_toy.safetensors").touch()
    for stem in "ab":
        (table.cache_directory / f"{stem}_toy_te.safetensors").touch()
    found = find_items(DatasetConfig(table.config_path, (table,)), "toy", LATENT)
    assert [item.parts for item in found.items] == [1, 2, 2]


def test_images_get_the_bucket_of_their_original_size(tmp_path: Path) -> None:
    table = make_table(tmp_path, "image_directory", resolution=(960, 544), enable_bucket=True)
    table.cache_directory.mkdir()
    for name in ("a_1920x1080_toy", "a_toy_te", "b_0640x0480_toy", "b_toy_te"):
        (table.cache_directory / f"{name}.safetensors").touch()
    found = find_items(DatasetConfig(table.config_path, (table,)), "toy", LATENT)
    assert [item.bucket for item in found.items] == [(960, 544), (832, 624)]


def test_items_without_text_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = cached(tmp_path)
    (tmp_path / "cache" / "clip_0_toy_te.safetensors").unlink()
    found = find_items(config, "toy", LATENT)
    items = require_items(found, COMMANDS)
    assert [item.source_stem for item in items] == ["clip_1"]
    assert "clip_0_toy_te.safetensors" in caplog.text
    assert "python cache_text.py --y" in caplog.text


@pytest.mark.parametrize("remove", ["*_toy.safetensors", "*_te.safetensors"])
def test_missing_caches_give_both_commands(tmp_path: Path, remove: str) -> None:
    config = cached(tmp_path)
    for path in (tmp_path / "cache").glob(remove):
        path.unlink()
    with pytest.raises(CacheError, match=r"(?s)python cache_latents\.py --x.*python cache_text\.py --y"):
        require_items(find_items(config, "toy", LATENT), COMMANDS)


def test_a_batch_stacks_what_has_one_size_and_lists_the_rest(tmp_path: Path) -> None:
    config = cached(tmp_path)
    (tmp_path / "clip_1.txt").write_text("one", encoding="utf-8")
    cache_texts(ToyFamily(), config, options())
    batch = read_batch(find_items(config, "toy", LATENT).items, LATENT)
    assert batch.tensor("latents").shape == (2, 2, 2, 4, 4)
    assert [tuple(one.shape) for one in batch.tensors["t5"]] == [(3, 4), (1, 4)]
    assert batch.captions == ("clip number 0", "one")
    assert batch.keys == ("clip_0_00000-005_0032x0032_toy", "clip_1_00000-005_0032x0032_toy")


def test_caches_of_the_known_tuners_load(tmp_path: Path) -> None:
    table = make_table(tmp_path, resolution=(64, 48))
    folder = table.cache_directory
    folder.mkdir()
    metadata = {"architecture": "toy", "width": "48", "height": "32", "format_version": "1.0.1"}
    latents = {
        "latents_2x4x6_bfloat16": torch.ones(2, 2, 4, 6, dtype=torch.bfloat16),
        # their name says another dtype than the tensor has
        "clip_bfloat16": torch.ones(3, 4, dtype=torch.float16),
        "latents_image_2x4x6_bfloat16": torch.ones(20, 2, 4, 6, dtype=torch.bfloat16),
    }
    write_tensors(folder / "a_b_00000-005_0048x0032_toy.safetensors", latents, metadata)
    text = {"llm_float16": torch.ones(4, 4), "llm_mask": torch.ones(4, dtype=torch.int64)}
    write_tensors(folder / "a_b_toy_te.safetensors", text, {"architecture": "toy", "caption1": "a text"})
    (item,) = find_items(DatasetConfig(table.config_path, (table,)), "toy", LATENT).items
    batch = read_batch([item], LATENT)
    assert set(batch.tensors) == {"latents", "clip", "latents_image", "llm", "llm_mask"}
    assert batch.captions == ("a text",)


def _spoil_resolution(folder: Path, config: DatasetConfig) -> DatasetConfig:
    return change(config, resolution=(64, 64))


def _spoil_rate(folder: Path, config: DatasetConfig) -> DatasetConfig:
    return change(config, source_fps=30.0)


def _spoil_bits(folder: Path, config: DatasetConfig) -> DatasetConfig:
    path = folder / "cache" / "clip_0_00000-005_0032x0032_toy.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    return config


def _spoil_length(folder: Path, config: DatasetConfig) -> DatasetConfig:
    path = folder / "cache" / "clip_0_00000-005_0032x0032_toy.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    return config


def _spoil_shape(folder: Path, config: DatasetConfig) -> DatasetConfig:
    path = folder / "cache" / "clip_0_00000-005_0032x0032_toy.safetensors"
    write_tensors(path, {"latents_2x4x6_bfloat16": torch.zeros(2, 2, 4, 6)}, {"architecture": "toy"})
    return config


def _spoil_source(folder: Path, config: DatasetConfig) -> DatasetConfig:
    make_clip(folder / "clip_0.mp4", 12)
    return config


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_spoil_resolution, "made for 32x32 pixels, .* asks for 64x64"),
        (_spoil_rate, "made for source_fps = None, .* has 30"),
        (_spoil_bits, "do not match their checksum"),
        (_spoil_length, "damaged"),
        (_spoil_shape, "shape 2x2x4x6, .* asks for 2x2x4x4"),
        (_spoil_source, r"clip_0\.mp4 has changed"),
    ],
)
def test_a_wrong_latent_file_is_named_with_the_reason_and_the_command(
    tmp_path: Path, spoil: Any, reason: str
) -> None:
    config = spoil(tmp_path, cached(tmp_path))
    item = find_items(config, "toy", LATENT).items[0]
    with pytest.raises(
        CacheError,
        match=rf"(?s)clip_0_00000-005_0032x0032_toy\.safetensors: .*{reason}.*python cache_latents\.py",
    ):
        read_batch([item], LATENT, COMMANDS)


def test_a_changed_caption_is_named_with_the_command(tmp_path: Path) -> None:
    config = cached(tmp_path)
    (tmp_path / "clip_0.txt").write_text("something else", encoding="utf-8")
    item = find_items(config, "toy", LATENT).items[0]
    with pytest.raises(
        CacheError, match=r"(?s)clip_0_toy_te\.safetensors: .*something else.*python cache_text\.py"
    ):
        read_batch([item], LATENT, COMMANDS)


def test_training_needs_no_sources(tmp_path: Path) -> None:
    config = cached(tmp_path)
    for path in [*tmp_path.glob("*.mp4"), *tmp_path.glob("*.txt")]:
        path.unlink()
    assert len(read_batch(find_items(config, "toy", LATENT).items, LATENT)) == 2


def test_an_epoch_holds_every_item_as_often_as_it_repeats(tmp_path: Path) -> None:
    table = make_table(tmp_path, batch_size=3, num_repeats=2)
    items = [*made_up(table, 5), *made_up(table, 2, (48, 32, 5), start=5)]
    order = BatchOrder(items, seed=1)
    batches = order.epoch(0)
    counts = Counter(item.key for batch in batches for item in batch)
    assert set(counts.values()) == {2}
    assert (order.num_items, order.num_batches, len(batches)) == (14, 6, 6)
    assert sorted(map(len, batches)) == [1, 1, 3, 3, 3, 3]
    assert all(len({item.bucket for item in batch}) == 1 for batch in batches)


def test_the_order_is_the_one_that_was_recorded(tmp_path: Path) -> None:
    """A run that is resumed with a later version of this program must see the same batches."""
    items = made_up(make_table(tmp_path, batch_size=2), 5)
    batches = BatchOrder(items, seed=42).epoch(1)
    assert [[item.key[-1] for item in batch] for batch in batches] == RECORDED


def test_validation_takes_whole_sources(tmp_path: Path) -> None:
    table = make_table(tmp_path)
    items = [item for frames in (5, 9) for item in made_up(table, 10, (32, 32, frames))]
    training, validation = split_validation(items, 0.2)
    assert len(validation) == 4
    assert len({item.source_stem for item in validation}) == 2
    assert not {item.source_stem for item in validation} & {item.source_stem for item in training}
    assert split_validation(list(reversed(items)), 0.2)[1] == validation[::-1]


RECORDED = [["2", "0"], ["3"], ["4", "1"]]
