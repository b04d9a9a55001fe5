"""Training from the index of a cache folder is training from the caches themselves, and reads no source."""

import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from dataset.batches.finding import FoundItems, find_items, require_items
from dataset.batches.items import CachingCommands, TrainingItem
from dataset.batches.reading import read_batch
from dataset.batches.starting import check_caches, compare_sources
from dataset.cache.index import NAME, TEXTS, fingerprint_table, write_index
from dataset.cache.store import Stores
from dataset.caching.loop import LATENTS, NextCommand, run_caching
from dataset.caching.loop import TEXTS as TEXT_WORK
from dataset.config import DatasetConfig
from dataset.config_keys import Indexed
from dataset.table import list_fields
from modules.errors import DatasetError, UserError
from tests.dataset.caching.test_loop import make_config
from tests.dataset.making import make_clip
from tests.dataset.toy_family import LATENT, ToyFamily, options

COMMANDS = CachingCommands(lambda: ("python cache_latents.py", "python cache_text.py"))
FOLLOWING = NextCommand(["next"], lambda: None)


def cache(config: DatasetConfig, *kinds: str) -> None:
    """Cache as the scripts do, with an index."""
    for kind in kinds or (LATENTS, TEXT_WORK):
        run_caching(kind, ToyFamily(), config, options(), None, FOLLOWING)  # type: ignore[arg-type]


def find(config: DatasetConfig) -> FoundItems:
    return find_items(config, "toy", LATENT, trusts_index=True)


def start(config: DatasetConfig) -> list[str]:
    """Start as a training does; return what is said."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        found = find(config)
        items = require_items(found, COMMANDS)
        family: Any = ToyFamily()
        check_caches(family, items, COMMANDS, Stores(), encodes_texts_on_the_fly=True)
        compare_sources(config.datasets, found, COMMANDS, "toy")
    except UserError as error:
        said.append(str(error))
    finally:
        logging.getLogger().removeHandler(handler)
    return said


def calls_of(run: Callable[[], object], *names: str) -> set[str]:
    """Return which functions of these names a call runs."""
    called = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name in names:
            called.add(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return called


def without_index(item: TrainingItem) -> TrainingItem:
    return replace(item, cache_info=replace(item.cache_info, indexed_checksums={}))


@pytest.mark.parametrize(
    "changes", [{}, {"target_frames": (1, 5)}, {"multi_caption": True}, {"caption_dropout_rate": 0.5}]
)
def test_items_and_batches_of_the_index_are_those_of_the_caches(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = make_config(tmp_path, **changes)
    (tmp_path / "clip_1.txt").write_text("one\ntwo\nthree", encoding="utf-8")
    cache(config)

    found = find(config)
    listed = find_items(config, "toy", LATENT)

    assert all(item.cache_info.indexed_checksums for item in found.items)
    assert [without_index(item) for item in found.items] == listed.items
    assert len({item.num_captions for item in found.items}) == (2 if "multi_caption" in changes else 1)
    for item, other in zip(found.items, listed.items, strict=True):
        batch, batch_of_caches = read_batch([item], LATENT), read_batch([other], LATENT)
        assert batch.cache_origins == batch_of_caches.cache_origins
        assert batch.captions == batch_of_caches.captions
        assert (batch.tensor("latents") == batch_of_caches.tensor("latents")).all()


def test_a_start_from_the_index_lists_and_compares_no_source(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    cache(config)
    looks = ("find_sources", "list_entries", "read_caption", "latent_errors", "text_errors")

    assert calls_of(lambda: start(config), *looks) == set()
    (tmp_path / "cache" / NAME).unlink()
    assert calls_of(lambda: start(config), *looks) == set(looks)


def touch(path: Path, text: str) -> None:
    """Write a text, some time ago."""
    path.write_text(text, encoding="utf-8")
    os.utime(path, (1e9, 1e9))


def replace_clip(folder: Path) -> None:
    make_clip(folder / "clip_0.mp4", 7)
    os.utime(folder / "clip_0.mp4", (1e9, 1e9))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a clip is replaced": (replace_clip, "clip_0.mp4 has changed since it was encoded"),
    "a clip is added": (
        lambda folder: make_clip(folder / "new.mp4", 5),
        "new.mp4: not cached, too short or unreadable",
    ),
    "a clip is removed": (
        lambda folder: (folder / "clip_0.mp4").unlink(),
        "caches whose file no longer exists, such as clip_0",
    ),
    "a caption is written anew": (
        lambda folder: touch(folder / "clip_0.txt", "another text"),
        "which now is 'another text'",
    ),
    "a caption is removed": (lambda folder: (folder / "clip_0.txt").unlink(), ""),
    "latents are deleted": (
        lambda folder: next((folder / "cache").glob("clip_0_*_toy.safetensors")).unlink(),
        "clip_0.mp4: not cached",
    ),
    "a text is deleted": (
        lambda folder: (folder / "cache" / "clip_0_toy_te.safetensors").unlink(),
        "have latents but no text cache",
    ),
    "text caching was killed": (
        lambda folder: (folder / "cache" / "clip_0_toy_te.safetensors.part").write_bytes(b""),
        "1 text cache is unfinished",
    ),
    "a cache is damaged": (
        lambda folder: (folder / "cache" / "clip_0_toy_te.safetensors").write_bytes(b"no"),
        "damaged",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_told_as_without_an_index(tmp_path: Path, change: str) -> None:
    config = make_config(tmp_path)
    cache(config)
    assert start(config) == []
    make, expected = CHANGES[change]

    make(tmp_path)
    said = start(config)
    (tmp_path / "cache" / NAME).unlink()

    assert start(config) == said
    assert expected in "\n".join(said)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("trigger_word", "zzz", "trigger_word was , is now zzz"),
        ("resolution", (64, 64), ""),
        ("target_frames", (1, 5), "in no cache"),
        ("alpha_mask", True, "alpha_mask"),
        ("fp_latent_window_size", 5, "fp_latent_window_size was 9, is now 5"),
    ],
)
def test_a_changed_key_is_told_as_without_an_index(
    tmp_path: Path, key: str, value: Any, expected: str
) -> None:
    config = make_config(tmp_path, target_frames=(5,))
    cache(config)
    changed = replace(config, datasets=(config.datasets[0].with_values(**{key: value}),))

    said = start(changed)
    (tmp_path / "cache" / NAME).unlink()

    assert start(changed) == said
    assert expected in "\n".join(said)


@pytest.mark.parametrize("name", [field.name for field in list_fields()])
def test_each_field_of_a_table_makes_the_parts_stale_that_it_declares(tmp_path: Path, name: str) -> None:
    table = make_config(tmp_path).datasets[0]
    (declared,) = (field for field in list_fields() if field.name == name)
    indexed = declared.metadata.get("indexed", Indexed.LATENTS_AND_TEXTS)
    value = Path("other") if name.endswith(("directory", "folder", "_file")) else object()
    changed = table.with_values(**{name: value})

    assert (changed.family_settings != table.family_settings) == (indexed is Indexed.LATENTS_ONLY)
    if indexed in (Indexed.LATENTS_ONLY, Indexed.NEITHER):
        assert fingerprint_table(changed) == fingerprint_table(table)
    else:
        assert fingerprint_table(changed) != fingerprint_table(table)


@pytest.mark.parametrize("name", ["mask_directory", "cache_directory"])
def test_files_of_a_folder_count_unless_a_field_declares_its_path_only(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    changes: dict[str, Any] = {name: folder}
    table = make_config(tmp_path).datasets[0].with_values(**changes)
    before = fingerprint_table(table)
    (folder / "new.png").touch()
    assert (fingerprint_table(table) == before) == (name == "cache_directory")


@pytest.mark.parametrize("folder", [".", "elsewhere"])
def test_caches_may_be_next_to_their_sources(tmp_path: Path, folder: str) -> None:
    config = make_config(tmp_path, cache_directory=tmp_path / folder)
    cache(config)
    assert all(item.cache_info.indexed_checksums for item in find(config).items)


def test_how_items_are_learned_may_change(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    cache(config)
    learned = config.datasets[0].with_values(num_repeats=3, prior_loss_weight=0.5, min_timestep=10)
    found = find(replace(config, datasets=(learned,)))
    assert [item.table.learning.num_repeats for item in found.items] == [3, 3]
    assert all(item.cache_info.indexed_checksums for item in found.items)


def test_a_clip_that_gives_nothing_is_told_at_each_start(tmp_path: Path) -> None:
    config = make_config(tmp_path, target_frames=(5,))
    make_clip(tmp_path / "short.mp4", 1)
    touch(tmp_path / "short.txt", "short")
    cache(config)

    said = start(config)
    assert calls_of(lambda: start(config), "find_sources") == set()
    (tmp_path / "cache" / NAME).unlink()

    assert start(config) == said
    assert "short.mp4: not cached" in "\n".join(said)


DAMAGES: dict[str, Callable[[str], str]] = {
    "cut off": lambda text: text[:-40],
    "its head lost": lambda text: text.split("\n", 1)[1],
    "of another version": lambda text: text.replace('"version": 1', '"version": 2'),
    "no JSON": lambda text: "reelsmith",
    "lists of lists": lambda text: "[[]]\n",
    "of a later time": lambda text: text.replace('"sources"', '"origins"'),
    "empty": lambda text: "",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_no_index_and_is_made_again(tmp_path: Path, damage: str) -> None:
    config = make_config(tmp_path)
    cache(config)
    path = tmp_path / "cache" / NAME
    full = path.read_text(encoding="utf-8")
    path.write_text(DAMAGES[damage](full), encoding="utf-8")

    found = find(config)
    assert len(found.items) == 2
    assert not any(item.cache_info.indexed_checksums for item in found.items)
    assert start(config) == []
    cache(config)

    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        json.loads(line) for line in full.splitlines()
    ]


def test_a_cache_made_without_the_index_is_compared_with_its_source(tmp_path: Path) -> None:
    """As an older version makes it, which leaves the index as it was."""
    config = make_config(tmp_path)
    cache(config)
    index = (tmp_path / "cache" / NAME).read_bytes()
    touch(tmp_path / "clip_0.txt", "another text")
    cache(config, TEXT_WORK)
    (tmp_path / "cache" / NAME).write_bytes(index)
    assert start(config) == []
    touch(tmp_path / "clip_0.txt", "a brown dog")

    said = start(config)

    assert "made from the caption 'another text', which now is 'a brown dog'" in "\n".join(said)


def test_parts_written_at_the_same_time_are_both_there(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    cache(config)
    table = config.datasets[0]
    path = tmp_path / "cache" / NAME
    before = path.read_text(encoding="utf-8")
    right = {name for name in os.listdir(path.parent) if name.endswith(".safetensors")}
    path.unlink()

    def write(part: str) -> None:
        for _ in range(5):
            write_index(table, part, "toy", LATENT, fingerprint_table(table), right, {})

    threads = [threading.Thread(target=write, args=[part]) for part in ("latents", TEXTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(path.read_text(encoding="utf-8").splitlines()) == sorted(before.splitlines())
    assert sorted(name for name in os.listdir(path.parent) if "lock" in name or "tmp" in name) == []


def test_a_shard_of_the_work_writes_no_index(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    shard = replace(options().shard, num_shards=2, shard_index=0)
    for kind in (LATENTS, TEXT_WORK):
        family: Any = ToyFamily()
        run_caching(kind, family, config, options(shard=shard), None, FOLLOWING)
    assert not (tmp_path / "cache" / NAME).exists()
    cache(config)
    assert all(item.cache_info.indexed_checksums for item in find(config).items)


def test_two_families_share_the_index_of_a_folder(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    cache(config)
    family: Any = ToyFamily(cache_tag="other")
    for kind in (LATENTS, TEXT_WORK):
        run_caching(kind, family, config, options(), None, FOLLOWING)
    for tag in ("toy", "other"):
        items = find_items(config, tag, LATENT, trusts_index=True).items
        assert len(items) == 2
        assert all(item.cache_info.indexed_checksums for item in items)


def test_a_failed_source_leaves_an_index_of_the_others(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    (tmp_path / "bad.mp4").write_bytes(b"no clip")
    touch(tmp_path / "bad.txt", "bad")
    with pytest.raises(DatasetError):
        cache(config, LATENTS)
    cache(config, TEXT_WORK)
    said = start(config)
    assert all(item.cache_info.indexed_checksums for item in find(config).items)
    (tmp_path / "cache" / NAME).unlink()
    assert start(config) == said
    assert "bad.mp4: not cached" in "\n".join(said)
