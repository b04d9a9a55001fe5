from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.report.check import check_training
from dataset.batches import reading, starting
from dataset.batches.checks import SameEncoders
from dataset.batches.finding import find_items, require_items
from dataset.batches.items import CachingCommands, TableCacheInfo, TrainingItem
from dataset.batches.order import BatchOrder, repeat_regularization, split_validation
from dataset.batches.reading import read_batch
from dataset.batches.starting import check_caches, compare_sources
from dataset.cache.store import Stores
from dataset.cache_files import write_tensors
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import DatasetConfig, DatasetTable
from modules.errors import CacheError
from protocols.family import Abilities
from tests.dataset.caching.test_loop import change, make_config
from tests.dataset.making import make_clip, make_image, make_table, subset_table
from tests.dataset.toy_family import LATENT, ToyFamily, options
from training.planning.memory import largest_batch

COMMANDS = CachingCommands(lambda: ("python cache_latents.py --x", "python cache_text.py --y"))


def cached(folder: Path, **changes: Any) -> DatasetConfig:
    config = make_config(folder, **changes)
    cache_media(ToyFamily(), config, options())
    cache_texts(ToyFamily(), config, options())
    return config


def make_items(
    table: DatasetTable, count: int, bucket: tuple[int, ...] = (64, 64), start: int = 0
) -> list[TrainingItem]:
    """Items without files."""
    stems = [f"clip{index:03d}" for index in range(start, start + count)]
    return [TrainingItem(f"{stem}_{table.index}", 7, table, bucket, TableCacheInfo("toy")) for stem in stems]


def test_items_are_found_by_name_alone(tmp_path: Path) -> None:
    config = cached(tmp_path, target_frames=(1, 5))
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"")  # nothing to read
    found = find_items(config, "toy", LATENT)
    spans = [(clip, frames) for clip in (0, 1) for frames in (1, 5)]
    assert [item.key for item in found.items] == [
        f"clip_{clip}_00000-{frames:03d}_0032x0032_toy" for clip, frames in spans
    ]
    assert [item.bucket for item in found.items] == [(32, 32, 1), (32, 32, 5)] * 2
    assert found.items[0].source_stem == "clip_0"
    assert found.items[0].caption_path(0).name == "clip_0_toy_te.safetensors"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((1, 5), ()),
        ((1,), ("clips of 5 frames are in caches, but not in target_frames",)),
        ((1, 5, 9), ("clips of 9 frames are in no cache",)),
        ((9,), ("clips of 9 frames are in no cache", "clips of 1, 5 frames are in caches")),
    ],
)
def test_lengths_that_are_asked_for_are_compared_with_the_caches(
    tmp_path: Path, asked: tuple[int, ...], said: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    config = cached(tmp_path, target_frames=(1, 5))
    table = config.datasets[0].with_values(target_frames=asked)
    found = find_items(DatasetConfig(config.path, (table,)), "toy", LATENT)
    compare_sources([table], found, COMMANDS, "toy")
    warned = [record.message for record in caplog.records if "clips of" in record.message]
    assert len(warned) == len(said)
    assert all(text in message for text, message in zip(said, warned, strict=True))


def test_whole_clips_beside_sections_are_one_part_each(tmp_path: Path) -> None:
    table = make_table(tmp_path, fp_latent_window_size=2)
    table.cache_directory.mkdir()
    for name in ("a_00000-005_0032x0032", "b_00000-009-0000_0032x0032", "b_00000-009-0001_0032x0032"):
        (table.cache_directory / f"{name}_toy.safetensors").touch()
    for stem in "ab":
        (table.cache_directory / f"{stem}_toy_te.safetensors").touch()
    found = find_items(DatasetConfig(table.config_path, (table,)), "toy", LATENT)
    assert [item.num_latent_files for item in found.items] == [1, 2, 2]


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
    latents = {
        "latents_2x4x6_bfloat16": torch.ones(2, 2, 4, 6).bfloat16(),
        "clip_bfloat16": torch.ones(3, 4).half(),  # the name says a different dtype than the tensor has
        "latents_image_2x4x6_bfloat16": torch.ones(20, 2, 4, 6).bfloat16(),
    }
    metadata = {"architecture": "toy", "width": "48", "height": "32", "format_version": "1.0.1"}
    write_tensors(folder / "a_b_00000-005_0048x0032_toy.safetensors", latents, metadata)
    text = {"llm_float16": torch.ones(4, 4), "llm_mask": torch.ones(4, dtype=torch.int64)}
    write_tensors(folder / "a_b_toy_te.safetensors", text, {"architecture": "toy", "caption1": "a text"})
    (item,) = find_items(DatasetConfig(table.config_path, (table,)), "toy", LATENT).items
    batch = read_batch([item], LATENT)
    assert set(batch.tensors) == {"latents", "clip", "latents_image", "llm", "llm_mask"}
    assert batch.captions == ("a text",)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"resolution": (64, 64)}, "made for 32x32 pixels, .* needs 64x64"),
        ({"source_fps": 30.0}, "made for source_fps = None, .* has 30"),
    ],
)
def test_a_cache_made_with_other_keys_is_named_with_the_command(
    tmp_path: Path, keys: dict[str, Any], reason: str
) -> None:
    item = find_items(change(cached(tmp_path), **keys), "toy", LATENT).items[0]
    said = rf"(?s)clip_0_00000-005_0032x0032_toy\.safetensors: .*{reason}.*python cache_latents\.py"
    with pytest.raises(CacheError, match=said):
        read_batch([item], LATENT, COMMANDS)


def test_a_cache_made_for_another_target_fps_is_named(tmp_path: Path) -> None:
    config = cached(tmp_path, source_fps="auto", target_fps=16.0, target_frames=(5,))
    (item, *_) = find_items(config, "toy", LATENT).items
    assert len(read_batch([item], LATENT)) == 1

    changed = replace(item, table=item.table.with_values(target_fps=24.0))

    with pytest.raises(CacheError, match=r"made for 16 frames per second, but .* has target_fps = 24"):
        read_batch([changed], LATENT)


class FittingToy(ToyFamily):
    """Its captions are JSON with positions, which are converted to those in the resized image."""

    def has_coordinates(self, caption: str) -> bool:
        return caption.startswith("{")

    def find_caption_errors(self, caption: str, size: Any) -> tuple[str, ...]:
        return ()

    def fit_caption(self, caption: str, size: Any, fit: Any) -> str:
        return caption.replace(str(size[0]), str(fit.bucket[0]))


def test_captions_with_converted_positions_are_trained_on_until_their_file_changes(tmp_path: Path) -> None:
    make_image(tmp_path / "a.png", (64, 64))
    (tmp_path / "a.txt").write_text('{"right": 64}', encoding="utf-8")
    table = make_table(tmp_path, "image_directory", resolution=(32, 32), caption_extension=".txt")
    config = DatasetConfig(tmp_path / "data.toml", (table,))
    family = FittingToy(abilities=Abilities(adjusts_captions=True))
    cache_media(family, config, options())
    cache_texts(family, config, options())
    items = find_items(config, "toy", LATENT).items

    assert read_batch(items, LATENT).captions == ('{"right": 32}',)

    (tmp_path / "a.txt").write_text('{"right": 60}', encoding="utf-8")
    with pytest.raises(CacheError, match=r"a\.txt has changed since its caption was encoded"):
        read_batch(items, LATENT)

    (tmp_path / "a.txt").write_text('{"right": 64}', encoding="utf-8")
    smaller = change(config, resolution=(16, 16))
    cache_media(family, smaller, options())  # latents alone are made again
    with pytest.raises(CacheError, match=r"resolution was \[32, 32\], is now \[16, 16\]"):
        read_batch(find_items(smaller, "toy", LATENT).items, LATENT)


def test_a_changed_source_is_named_and_one_that_is_gone_is_not_needed(tmp_path: Path) -> None:
    config = cached(tmp_path)
    items = find_items(config, "toy", LATENT).items
    (tmp_path / "clip_0.txt").write_text("something else", encoding="utf-8")
    make_clip(tmp_path / "clip_1.mp4", 12)

    for item, said in zip(items, ("something else.*text", r"clip_1\.mp4 has changed.*latents"), strict=True):
        with pytest.raises(CacheError, match=rf"(?s){said}\.py"):
            read_batch([item], LATENT, COMMANDS)
    for path in [*tmp_path.glob("*.mp4"), *tmp_path.glob("*.txt")]:
        path.unlink()
    assert len(read_batch(items, LATENT)) == 2


def test_an_epoch_holds_every_item_as_often_as_it_repeats(tmp_path: Path) -> None:
    table = make_table(tmp_path, batch_size=3, num_repeats=2)
    items = [*make_items(table, 5), *make_items(table, 2, (48, 32, 5), start=5)]
    order = BatchOrder(items, seed=1)
    batches = order.epoch(0)
    counts = Counter(item.key for batch in batches for item in batch)
    assert set(counts.values()) == {2}
    assert (order.num_items, order.num_batches, len(batches)) == (14, 6, 6)
    assert sorted(map(len, batches)) == [1, 1, 3, 3, 3, 3]
    assert all(len({item.bucket for item in batch}) == 1 for batch in batches)


def test_the_order_is_the_one_that_was_recorded(tmp_path: Path) -> None:
    """A run that is resumed with a later version of this program must see the same batches."""
    items = make_items(make_table(tmp_path, batch_size=2), 5)
    batches = BatchOrder(items, seed=42).epoch(1)
    stems = [[item.source_stem[-1] for item in batch] for batch in batches]
    assert stems == [["2", "0"], ["3"], ["4", "1"]]


def test_validation_takes_whole_sources(tmp_path: Path) -> None:
    table = make_table(tmp_path)
    items = [item for frames in (5, 9) for item in make_items(table, 10, (32, 32, frames))]
    training, validation = split_validation(items, 0.2)
    assert len(validation) == 4
    assert len({item.source_stem for item in validation}) == 2
    assert not {item.source_stem for item in validation} & {item.source_stem for item in training}
    assert split_validation(list(reversed(items)), 0.2)[1] == validation[::-1]


def test_subsets_of_a_dataset_share_batches_of_one_size(tmp_path: Path) -> None:
    table = subset_table(tmp_path, batch_size=4, num_repeats=2)
    other = table.with_values(index=1, subset=1, num_repeats=1)
    apart = table.with_values(index=2, group=1, subset=0, num_repeats=1)
    items = [
        *make_items(table, 3),
        *make_items(other, 2),
        *make_items(apart, 3),
        *make_items(other, 1, (64, 32)),
    ]
    order = BatchOrder(items, 5)

    batches = list(order.epoch(0))

    assert sorted(len(batch) for batch in batches) == [1, 3, 4, 4]
    assert any({item.table.index for item in batch} == {0, 1} for batch in batches)
    assert all(len({item.table.batch_group for item in batch}) == 1 for batch in batches)
    assert Counter(item.key for batch in batches for item in batch)["clip000_0"] == 2


@pytest.mark.parametrize(
    ("repeats", "learned", "expected"),
    [
        ([1, 1, 1], 2, [1, 1, 0]),  # the rest is not used
        ([1, 1, 1], 7, [3, 2, 2]),
        ([2, 2, 1], 3, [2, 2, 0]),  # whole images only
        ([2, 1], 10, [6, 4]),
        ([1], 0, [0]),
    ],
)
def test_regularisation_images_are_as_many_as_others(repeats, learned: int, expected: list[int]) -> None:
    assert repeat_regularization(repeats, learned) == expected


def test_regularisation_counts_in_its_own_dataset(tmp_path: Path) -> None:
    table = subset_table(tmp_path, num_repeats=3, batch_size=2)
    reg = table.with_values(index=1, subset=1, num_repeats=1, is_reg=True)
    apart = table.with_values(index=2, group=1, num_repeats=1)
    items = [*make_items(table, 2), *make_items(reg, 4), *make_items(apart, 9)]
    order = BatchOrder(items, 1)

    counts = Counter(item.key for batch in order.epoch(3) for item in batch)

    assert order.num_items == 6 + 6 + 9
    assert [counts[item.key] for item in items[2:6]] == [2, 2, 1, 1]


def test_the_largest_batch_is_of_the_first_items_of_its_bucket(tmp_path: Path) -> None:
    table = subset_table(tmp_path, batch_size=3, num_repeats=2)
    other = table.with_values(index=1, group=1, batch_size=9, num_repeats=1)
    items = [*make_items(table, 5), *make_items(other, 2), *make_items(other, 8, (32, 32))]

    assert largest_batch(items) == tuple(items[:3])  # 12288 pixels; nine of the small ones would be 9216
    assert largest_batch(items[4:]) == (items[4], items[4])  # as often as it is repeated


ONE, OTHER = "1a2b3c4d" * 4, "99887766" * 4


def cached_by_two(folder: Path, media: dict[str, str], other_media: dict[str, str]) -> DatasetConfig:
    """Two clips, of which the second's caches were made by other encoders."""
    config = make_config(folder)
    for family in (ToyFamily(media_identity=media), ToyFamily(media_identity=other_media)):
        kept = {path: path.read_bytes() for path in (folder / "cache").glob("clip_0*")}
        cache_media(family, config, options())
        cache_texts(family, config, options())
        for path, content in kept.items():
            path.write_bytes(content)
    return config


def said_of(config: DatasetConfig) -> list[str]:
    """What is said when each item is read twice."""
    encoders = SameEncoders(COMMANDS)
    items = find_items(config, "toy", LATENT).items
    assert len(items) == 2
    found = [encoders.difference(read_batch([item], LATENT).cache_origins) for item in [*items, *items]]
    return [said for said in found if said is not None]


def test_what_differs_is_told_once_with_a_file_of_each_and_what_to_do(tmp_path: Path) -> None:
    config = cached_by_two(tmp_path, {"vae": ONE, "tile": "None"}, {"vae": OTHER, "tile": "None"})
    checked = check_training(config, "toy", LATENT, COMMANDS)
    assert "  Not all caches were made by the same encoders:" in checked.lines
    assert checked.exit_code == 0
    (said,) = said_of(config)
    assert said.splitlines() == [
        "Not all caches were made by the same encoders:",
        f"  {tmp_path / 'cache' / 'clip_0_00000-005_0032x0032_toy.safetensors'}: vae 1a2b3c4d...",
        f"  {tmp_path / 'cache' / 'clip_1_00000-005_0032x0032_toy.safetensors'}: vae 99887766...",
        "  Unless the encoders' files contain the same network, the model learns a mixture that fits "
        "neither. To make all caches alike, cache again with:",
        "  python cache_latents.py --x",
    ]


def test_another_dtype_is_no_other_network(tmp_path: Path) -> None:
    config = cached_by_two(
        tmp_path, {"vae": ONE, "vae_dtype": "bfloat16"}, {"vae": ONE, "vae_dtype": "float16", "clip": OTHER}
    )
    (said,) = said_of(config)
    assert "clip_0_00000-005_0032x0032_toy.safetensors: vae_dtype bfloat16" in said
    assert "clip_1_00000-005_0032x0032_toy.safetensors: vae_dtype float16" in said
    assert "Their values differ slightly." in said


@pytest.mark.parametrize(("max_bytes", "captions"), [(1 << 30, ([0, 1, 1], [0, 2, 2])), (1, ([0], [0]))])
def test_processes_share_the_check_and_the_first_captions_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int, captions: tuple[list[int], ...]
) -> None:
    (item, other) = require_items(find_items(cached(tmp_path), "toy", LATENT), COMMANDS)[:2]
    items = [replace(one, num_captions=3) for one in (item, other)]
    looked: list[tuple[str, int]] = []

    def read(batch: list[TrainingItem], *given: Any, **more: Any) -> Any:
        looked.append((batch[0].key, more["captions"][0]))
        return read_batch([replace(batch[0], num_captions=1)], LATENT)

    monkeypatch.setattr(starting, "read_batch", read)
    monkeypatch.setattr(starting, "MAX_READ_BYTES", max_bytes)
    for number, expected in enumerate(captions):
        before = len(looked)
        check_caches(ToyFamily(), items, COMMANDS, Stores(), True, (number, 2))
        assert [caption for _, caption in looked[before:]] == expected
    assert len(set(looked)) == len(looked)


@pytest.mark.parametrize(("maximum", "told"), [(100, True), (2, False)])
def test_large_folders_are_not_listed(
    tmp_path: Path,
    maximum: int,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = cached(tmp_path)
    make_clip(Path(str(config.datasets[0].source.directory)) / "new.mkv", 5)
    monkeypatch.setattr(starting, "MAX_LISTED", maximum)
    monkeypatch.setattr(starting, "find_sources", starting.find_sources if told else None)
    compare_sources(config.datasets, find_items(config, "toy", LATENT), COMMANDS, "toy")
    assert ("with no latents" in caplog.text) == told


def test_a_clip_without_latents_is_named_even_if_another_table_lacks_a_text_of_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = []
    for index, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        (table,) = cached(tmp_path / name).datasets
        tables.append(replace(table, index=index))
    (tables[0].cache_directory / "clip_1_toy_te.safetensors").unlink()
    for part in tables[1].cache_directory.glob("clip_1_*"):
        part.unlink()
    found = find_items(DatasetConfig(tmp_path / "data.toml", tuple(tables)), "toy", LATENT)

    compare_sources(tables, found, COMMANDS, "toy")

    (said,) = [record.getMessage() for record in caplog.records if "with no latents" in record.getMessage()]
    assert str(tmp_path / "two" / "clip_1.mp4") in said


@pytest.mark.parametrize(("mode", "windows"), [("chunk", 2), ("uniform", 3), ("head", 1)])
def test_a_window_without_latents_is_told(
    mode: str, windows: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = reading._count_windows

    def given(item: TrainingItem) -> TrainingItem:
        return replace(item, table=item.table.with_values(has_precomputed_latents=True))

    config = cached(tmp_path, clips=(10, 10), frame_extraction=mode, frame_sample=3)

    def check(process: tuple[int, int] = (0, 1)) -> str:
        items = find_items(config, "toy", LATENT).items
        caplog.clear()
        check_caches(ToyFamily(), items, COMMANDS, Stores(), True, process)
        return caplog.text

    assert "fewer latents" not in check()
    if windows > 1:
        next((tmp_path / "cache").glob("clip_0_*x*_toy.safetensors")).unlink()
        assert (
            f"1 clip with fewer latents than windows, such as clip_0, {windows - 1} of {windows}" in check()
        )
        assert "fewer latents" not in check((1, 2))  # the first process tells
        monkeypatch.setattr(reading, "_count_windows", lambda item, *rest: count(given(item), *rest))
        assert "fewer latents" not in check()


def test_another_item_of_the_same_sizes_takes_the_turns_of_one_that_rests(tmp_path: Path) -> None:
    table = make_table(tmp_path, batch_size=2)
    items = [*make_items(table, 4), *make_items(table, 1, (48, 32, 5), start=4)]
    resting, aside, _, _, alone = [item.key for item in items]
    order = BatchOrder(items, seed=1)
    planned = [order.epoch(number) for number in range(200)]

    order.set_turns({resting: 0.25, aside: 0.0, alone: 0.0})

    drawn = [order.epoch(number) for number in range(200)]
    counts = Counter(item.key for epoch in drawn for batch in epoch for item in batch)
    assert 30 < counts[resting] < 70
    assert counts[aside] == 0
    assert counts[alone] == 200  # nothing has its size
    sizes = [[[len(batch) for batch in epoch] for epoch in epochs] for epochs in (planned, drawn)]
    assert sizes[0] == sizes[1]
    assert all(len({item.bucket for item in batch}) == 1 for epoch in drawn for batch in epoch)
    assert order.planned_epoch(7) == planned[7]
